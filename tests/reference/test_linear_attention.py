"""Linear attention, short convolutions and selective scans: token by token, row by row, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nybble.kernels import library
from nybble.kernels.linear_attention import cpu
from nybble.kernels.linear_attention import torch as reference
from nybble.kernels.linear_attention.ops import linear_attention, selective_scan, short_convolution
from nybble.kernels.linear_attention.self_test import self_test
from nybble.kernels.linear_attention.torch import Inputs, Settings

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


WIDTHS = [(16, 32, 2, 4), (128, 64, 1, 8), (64, 48, 3, 3)]  # of keys and values, heads of keys and of values


@pytest.fixture(params=range(len(library.INSTRUCTION_SETS)))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[int]:
    if library.unavailable():
        pytest.skip(str(library.unavailable()))
    try:
        library.set_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.set_instruction_set(-1)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("delta", [False, True])
def test_native_code_gives_what_the_reference_gives(delta: bool, dtype: torch.dtype, share: float) -> None:
    for key_width, width, key_heads, heads in WIDTHS:
        for lengths, parents in SHAPES:
            n = sum(lengths)
            mixed = torch.randn(n, 2 * key_heads * key_width + heads * width).to(dtype)  # as a layer's projection is
            q, k, v = mixed.split([key_heads * key_width, key_heads * key_width, heads * width], 1)
            q, k, v = q.view(n, key_heads, -1), k.view(n, key_heads, -1), v.view(n, heads, -1)
            inputs = Inputs(q, k, v, -torch.rand(n, heads), torch.rand(n, heads))
            exact, settings = Inputs(*(x.double() for x in inputs)), Settings(lengths, parents, 0.3, delta, delta)
            grad = torch.randn(v.shape).to(dtype)
            assert cpu.takes(inputs)
            found = (cpu.attend(inputs, settings), *cpu.attend_backward(grad, inputs, settings))
            wanted = (reference.attend(exact, settings), *reference.attend_backward(grad.double(), exact, settings))
            assert_near([x.double() for x in found], wanted, share)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("silu", [False, True])
def test_native_convolutions_give_what_the_reference_gives(silu: bool, dtype: torch.dtype, share: float) -> None:
    for lengths, parents in SHAPES:
        n = sum(lengths)
        x, grad = torch.randn(n, 96)[:, 32:].to(dtype), torch.randn(n, 64).to(dtype)
        weight, bias, rest = torch.randn(64, 4), torch.randn(64), (silu, lengths, parents)
        found = (cpu.convolve(x, weight, bias, *rest), *cpu.convolve_backward(grad, x, weight, bias, *rest))
        exact = (x.double(), weight.double(), bias.double(), *rest)
        wanted = (reference.convolve(*exact), *reference.convolve_backward(grad.double(), *exact))
        assert_near([y.double() for y in found], wanted, share)


@pytest.mark.usefixtures("instruction_set")
def test_what_scratch_memory_held_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(*(torch.randn(40, 2, 16) for _ in range(3)), -torch.rand(40, 2), torch.rand(40, 2))
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: make(*size, **kind).fill_(torch.nan))
    settings = Settings((17, 23), (), 1.0, delta=True, normalize=True)
    found = (cpu.attend(inputs, settings), *cpu.attend_backward(inputs.v, inputs, settings))
    assert all(x.isfinite().all() for x in found)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    n = 200
    q, k, v = (torch.randn(n, heads, 32) for heads in (1, 1, 8))
    inputs = Inputs(q, k, v, -torch.rand(n, 8), torch.rand(n, 8))
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(cpu.attend_backward(v, inputs, Settings((150, 50), (), 1.0, delta=True, normalize=True)))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_the_self_test_finds_a_state_that_is_not_reset() -> None:
    class Leaking:
        takes = staticmethod(reference.takes)
        takes_convolution = staticmethod(reference.takes_convolution)
        attend_backward = staticmethod(reference.attend_backward)

        @staticmethod
        def attend(inputs: Inputs, settings: Settings) -> Tensor:
            return reference.attend(inputs, settings._replace(lengths=(sum(settings.lengths),), parents=()))

    assert self_test(reference, torch.device("cpu")) is None
    assert "result is off" in str(self_test(Leaking, torch.device("cpu")))


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
