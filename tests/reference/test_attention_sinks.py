"""Attention with sinks against its definition: one more column of scores, which has no value."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nybble.kernels import attend
from nybble.kernels.attention import cpu as cpu_attention

LENGTHS = (9, 1, 14)
CASES = [(None, 0.0, ()), (4, 0.0, ()), (None, 3.0, ()), (5, 2.0, ()), (None, 0.0, (-1, 0, 0)), (6, 0.0, (-1, 0, 1))]


def drawn(width: int = 16) -> tuple[Tensor, ...]:
    """q of four heads, k and v of two, and a sink for each head, in float64."""
    n = sum(LENGTHS)
    shapes = ((n, 4, width), (n, 2, width), (n, 2, width), (4,))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, softcap: float, parents: Sequence[int]
) -> Tensor:
    key, value = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, key) * 0.25
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen(window, parents), -torch.inf)
    column = sinks[:, None, None].expand(-1, len(q), 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("hij,jhd->ihd", shares, value)


def seen(window: int | None, parents: Sequence[int]) -> Tensor:
    """Which tokens, in columns, the tokens in rows see."""
    paths: list[list[int]] = []
    ends: list[int] = []
    for i, length in enumerate(LENGTHS):
        parent = parents[i] if parents else -1
        paths.append([*(paths[parent] if parent >= 0 else []), i])
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    owner = [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    place = [ends[i] - length + j for i, length in enumerate(LENGTHS) for j in range(length)]
    return torch.tensor(
        [
            [b in paths[a] and 0 <= at - other < (window or 99) for b, other in zip(owner, place, strict=True)]
            for a, at in zip(owner, place, strict=True)
        ]
    )


@pytest.mark.parametrize(("window", "softcap", "parents"), CASES)
def test_result_and_gradients_are_those_of_the_definition(
    window: int | None, softcap: float, parents: tuple[int, ...]
) -> None:
    inputs = [x.requires_grad_() for x in drawn()]
    out = attend(*inputs[:3], LENGTHS, 0.25, window, softcap, parents, inputs[3])
    wanted = by_definition(*inputs, window, softcap, parents)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(result, inputs, grad) for result in (out, wanted))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_backward_pass_is_that_of_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in drawn(width=4)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], LENGTHS, 0.5, 6, 2.0, sinks=x[3]), inputs, fast_mode=True)


def test_a_sink_that_attracts_nothing_changes_nothing() -> None:
    q, k, v, sinks = drawn()
    none = torch.full_like(sinks, -torch.inf)
    plain, _ = torch.ops.nybble.attend(q, k, v, LENGTHS, 0.25, None, 0.0)
    assert torch.equal(attend(q, k, v, LENGTHS, 0.25, sinks=none), plain)
    assert not torch.allclose(attend(q, k, v, LENGTHS, 0.25, sinks=sinks), attend(q, k, v, LENGTHS, 0.25))


@pytest.mark.skipif(cpu_attention.unavailable() is not None, reason=str(cpu_attention.unavailable()))
def test_native_code_computes_sinks_in_bfloat16() -> None:
    wide = [x.bfloat16().double().requires_grad_() for x in drawn(width=64)]
    low = [x.detach().bfloat16().requires_grad_() for x in wide]
    grad = torch.randn(sum(LENGTHS), 4, 64).bfloat16()
    wanted = by_definition(*wide, None, 0.0, ())
    out = attend(*low[:3], LENGTHS, 0.25, sinks=low[3])
    sides = [(out, *torch.autograd.grad(out, low, grad)), (wanted, *torch.autograd.grad(wanted, wide, grad.double()))]
    for found, expected in zip(*sides, strict=True):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 3e-2  # as in the self-test of attention


def test_a_plan_traces_sinks_without_data() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(24, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        sinks = torch.empty(4, requires_grad=True)
        out = attend(q, k, v, LENGTHS, 0.25, sinks=sinks)
        out.sum().backward()
        assert (out.shape, out.dtype, sinks.grad.shape) == ((24, 4, 16), torch.bfloat16, (4,))
