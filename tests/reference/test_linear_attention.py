"""Linear attention, short convolutions and selective scans: token by token, row by row, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nybble.kernels.linear_attention.ops import linear_attention, selective_scan, short_convolution

ROWS = (5, 1, 70, 129)
TREE = ((40, 30, 3, 65, 20, 9), (-1, 0, 1, 0, -1, 4))
SHAPES = [(ROWS, ()), TREE]
Shape = tuple[Sequence[int], Sequence[int]]  # lengths and parents


def token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    shape: Shape,
    **settings: bool,
) -> Tensor:
    """The recurrence as it is written, with a state for each head."""
    lengths, parents = shape
    g = g if g.dim() == 3 else g.unsqueeze(-1)
    if settings["normalize"]:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q, k))
    ends: list[Tensor] = []
    outs, token = [], 0
    for length, parent in zip(lengths, parents or (-1,) * len(lengths), strict=True):
        state = ends[parent] if parent >= 0 else v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        for t in range(token, token + length):
            state = g[t].exp().unsqueeze(-1) * state
            known = (state * k[t].unsqueeze(-1)).sum(1) if settings["delta"] else 0
            state = state + k[t].unsqueeze(-1) * (beta[t].unsqueeze(-1) * (v[t] - known)).unsqueeze(1)
            outs.append((state * q[t].unsqueeze(-1)).sum(1))
        token += length
        ends.append(state)
    return torch.stack(outs)


def attention_inputs(n: int, columns: bool, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k of two heads, v, g and beta of four, in float64."""
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, heads, width, generator=make).double() for heads, width in ((2, 8), (2, 8), (4, 6)))
    g = -torch.rand(n, 4, *((8,) if columns else ()), generator=make).double()
    return q, k * 0.4, v, g, torch.rand(n, 4, generator=make).double()


def grads_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def assert_near(ours: Sequence[Tensor], theirs: Sequence[Tensor], share: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_give_what_the_recurrence_gives(shape: Shape, delta: bool, normalize: bool, columns: bool) -> None:
    inputs = attention_inputs(sum(shape[0]), columns)
    weights = torch.randn(inputs[2].shape).double()
    settings = {"delta": delta, "normalize": normalize}
    ours = grads_of(lambda *x: linear_attention(*x, *shape, **settings), inputs, weights)
    theirs = grads_of(lambda *x: token_by_token(*x, shape, **settings), inputs, weights)
    assert_near(ours, theirs, 1e-11)


@pytest.mark.parametrize("columns", [False, True])
def test_a_state_that_is_forgotten_at_once_and_one_that_is_kept_give_numbers(columns: bool) -> None:
    q, k, v, g, beta = attention_inputs(150, columns)
    g = torch.where(torch.rand(g.shape) < 0.5, -500.0, 0.0).double()
    inputs = (q, k, v, g, beta)
    weights = torch.randn(v.shape).double()
    settings = {"delta": True, "normalize": True}
    ours = grads_of(lambda *x: linear_attention(*x, (150,), **settings), inputs, weights)
    assert_near(ours, grads_of(lambda *x: token_by_token(*x, ((150,), ()), **settings), inputs, weights), 1e-11)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_derivatives_of_linear_attention(delta: bool, columns: bool) -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(9, columns)]
    torch.autograd.gradcheck(
        lambda *x: linear_attention(*x, (4, 2, 3), (-1, 0, -1), 0.7, delta, normalize=delta), inputs, fast_mode=True
    )


def filtered(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """torch's own convolution of each row."""
    taps = weight.shape[1]
    rows = [
        torch.nn.functional.conv1d(row.t(), weight.unsqueeze(1), bias, padding=taps - 1, groups=len(weight))
        for row in x.split(list(lengths))
    ]
    return torch.cat([out[:, :length].t() for out, length in zip(rows, lengths, strict=True)])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_a_convolution_is_torch_s_own_on_each_row(taps: int, has_bias: bool, silu: bool) -> None:
    lengths = (5, 1, 2, 30)
    inputs = [torch.randn(38, 6).double(), torch.randn(6, taps).double(), *([torch.randn(6).double()] * has_bias)]
    weights = torch.randn(38, 6).double()

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return short_convolution(x, weight, bias, silu, lengths)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = filtered(x, weight, bias, lengths)
        return torch.nn.functional.silu(out) if silu else out

    assert_near(grads_of(ours, inputs, weights), grads_of(theirs, inputs, weights), 1e-12)
    leaves = [x.requires_grad_() for x in inputs]
    torch.autograd.gradcheck(ours, leaves, fast_mode=True)


def test_a_branch_convolves_what_it_continues() -> None:
    """Segments of 1 token too: the taps of the third reach into the first."""
    lengths, parents, paths = (3, 1, 2, 4), (-1, 0, 1, 0), ((0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7, 8, 9))
    x, weight = torch.randn(10, 6).double(), torch.randn(6, 4).double()
    out = short_convolution(x, weight, None, True, lengths, parents)
    for path in paths:
        alone = short_convolution(x[list(path)], weight, None, True, (len(path),))
        torch.testing.assert_close(out[list(path)], alone, rtol=1e-14, atol=1e-14)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    torch.autograd.gradcheck(
        lambda x, weight: short_convolution(x, weight, None, True, lengths, parents), leaves, fast_mode=True
    )


def scan_inputs(n: int) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    x, dt, b, c = (torch.randn(n, width, generator=make).double() for width in (5, 5, 3, 3))
    return x, dt.abs(), -torch.rand(5, 3, generator=make).double(), b, c


def scanned(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, shape: Shape) -> Tensor:
    """The recurrence as it is written."""
    lengths, parents = shape
    ends: list[Tensor] = []
    outs, token = [], 0
    for length, parent in zip(lengths, parents or (-1,) * len(lengths), strict=True):
        state = ends[parent] if parent >= 0 else torch.zeros_like(a)
        for t in range(token, token + length):
            state = (dt[t].unsqueeze(-1) * a).exp() * state + (dt[t] * x[t]).unsqueeze(-1) * b[t]
            outs.append(state @ c[t])
        token += length
        ends.append(state)
    return torch.stack(outs)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scan_gives_what_the_recurrence_gives(shape: Shape) -> None:
    inputs = scan_inputs(sum(shape[0]))
    weights = torch.randn(inputs[0].shape).double()
    ours = grads_of(lambda *x: selective_scan(*x, *shape), inputs, weights)
    assert_near(ours, grads_of(lambda *x: scanned(*x, shape), inputs, weights), 1e-11)


def test_derivatives_of_the_scan() -> None:
    inputs = [x.requires_grad_() for x in scan_inputs(9)]
    torch.autograd.gradcheck(lambda *x: selective_scan(*x, (4, 2, 3), (-1, 0, -1)), inputs, fast_mode=True)


def test_autocast_leaves_the_products_as_they_are() -> None:
    inputs = [x.float() for x in attention_inputs(70, False)]
    apart = linear_attention(*inputs, (70,), delta=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(*inputs, (70,), delta=True), apart)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, g, beta = attention_inputs(8, False)
    with pytest.raises(ValueError, match="q and k must be"):
        linear_attention(q, k, v[:, :3], g, beta, (8,))
    with pytest.raises(ValueError, match="lengths must be positive and sum to the 8 tokens"):
        linear_attention(q, k, v, g, beta, (8, 0))
    with pytest.raises(ValueError, match="pre-order"):
        linear_attention(q, k, v, g, beta, (4, 4), (1, -1))
    with pytest.raises(ValueError, match=r"x must be \(T, channels\)"):
        short_convolution(torch.zeros(8, 4), torch.zeros(5, 3), None, False, (8,))
    x, dt, a, b, c = scan_inputs(8)
    with pytest.raises(ValueError, match="x and dt must be"):
        selective_scan(x, dt, a.t(), b, c, (8,))
