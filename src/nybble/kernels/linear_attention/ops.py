"""Linear attention, short convolutions and selective scans over the documents of a flattened batch.

`linear_attention`, `short_convolution` and `selective_scan` can be differentiated once. A document begins with an empty
state, so rows that follow one another in one sequence give what each gives alone; `lengths` and `parents` are those of
`nybble.kernels.attention`. Only the inputs are kept for the backward, which computes the states again. The formulas
are those of `nybble.kernels.linear_attention.torch`, which runs where nothing faster does.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nybble.kernels.attention.segments import check_parents
from nybble.kernels.dispatch import dispatcher
from nybble.kernels.linear_attention import torch as reference
from nybble.kernels.linear_attention.torch import Inputs, ScanInputs, Settings

__all__ = ["linear_attention", "selective_scan", "short_convolution"]


def linear_attention(
    q: Tensor,  # (T, key heads, width)
    k: Tensor,  # (T, key heads, width)
    v: Tensor,  # (T, heads, width of v), heads a multiple of key heads
    g: Tensor,  # (T, heads) or (T, heads, width)
    beta: Tensor,  # (T, heads)
    lengths: Sequence[int],
    parents: Sequence[int] = (),
    scale: float = 1.0,
    delta: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Causal linear attention within each document, of the shape and type of v.

    Args:
        q, k, v: of any floating types.
        g: logarithm of the decay of a head's state, or of each row of it; not positive.
        beta: how much of a token enters the state.
        lengths: tokens of each document or segment, none of them 0.
        parents: for each segment the one that it continues, or -1; by default each is a document.
        scale: of the result.
        delta: the delta rule, which takes away from a token what the state says of it already.
        normalize: divides each query and key by its length.

    Raises:
        ValueError: shapes or lengths that do not fit each other.
    """
    heads = (*v.shape[:2],)
    fits = q.dim() == v.dim() == 3 and q.shape == k.shape and len(q) == len(v) and v.shape[1] % q.shape[1] == 0
    if not fits or beta.shape != heads or g.shape not in (heads, (*heads, q.shape[2])):
        raise ValueError(
            "q and k must be (T, key heads, width), v (T, a multiple of key heads, width), g and beta (T, heads), got "
            + ", ".join(str(tuple(x.shape)) for x in (q, k, v, g, beta))
        )
    _check(len(v), lengths, parents)
    out: Tensor = torch.ops.nybble.linear_attention(q, k, v, g, beta, lengths, parents, scale, delta, normalize)
    return out


def short_convolution(
    x: Tensor,  # (T, channels)
    weight: Tensor,  # (channels, taps)
    bias: Tensor | None,  # (channels,)
    silu: bool,
    lengths: Sequence[int],
    parents: Sequence[int] = (),
) -> Tensor:
    """A causal filter for each channel within each document, `(T, channels)` in the type of x.

    The last tap meets the token itself; SiLU follows where `silu` says so.

    Raises:
        ValueError: shapes or lengths that do not fit each other.
    """
    fits = x.dim() == weight.dim() == 2 and len(weight) == x.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be (T, channels), weight (channels, taps) and bias (channels,), got {shapes}")
    _check(len(x), lengths, parents)
    out: Tensor = torch.ops.nybble.short_convolution(x, weight, bias, silu, lengths, parents)
    return out


def selective_scan(
    x: Tensor,  # (T, channels)
    dt: Tensor,  # (T, channels)
    a: Tensor,  # (channels, n)
    b: Tensor,  # (T, n)
    c: Tensor,  # (T, n)
    lengths: Sequence[int],
    parents: Sequence[int] = (),
) -> Tensor:
    """Mamba's scan within each document, of the shape and type of x; dt is not negative, and a is not positive.

    Raises:
        ValueError: shapes or lengths that do not fit each other.
    """
    n = a.shape[-1]
    if dt.shape != x.shape or a.shape != (x.shape[1], n) or b.shape != (len(x), n) or c.shape != b.shape:
        shapes = ", ".join(str(tuple(y.shape)) for y in (x, dt, a, b, c))
        raise ValueError(f"x and dt must be (T, channels), a (channels, n), b and c (T, n), got {shapes}")
    _check(len(x), lengths, parents)
    out: Tensor = torch.ops.nybble.selective_scan(x, dt, a, b, c, lengths, parents)
    return out


def _check(n_tokens: int, lengths: Sequence[int], parents: Sequence[int]) -> None:
    if sum(lengths) != n_tokens or min(lengths, default=1) < 1:
        raise ValueError(f"lengths must be positive and sum to the {n_tokens} tokens, got {list(lengths)[:8]}")
    if parents:
        check_parents(lengths, parents)


def _code(inputs: Inputs) -> ModuleType:
    """What computes linear attention of these: the backend of their device, or plain torch."""
    code: ModuleType = dispatcher.code("linear_attention", inputs.v.device)
    return code if code.takes(inputs) else reference


def _filter_code(x: Tensor) -> ModuleType:
    code: ModuleType = dispatcher.code("linear_attention", x.device)
    return code if code.takes_convolution(x) else reference


def _exactly(x: Tensor) -> torch.autocast:
    """Products within take the types that they are given."""
    return torch.autocast(x.device.type, enabled=False)


# Linear attention


@torch.library.custom_op("nybble::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lengths: Sequence[int],
    parents: Sequence[int],
    scale: float,
    delta: bool,
    normalize: bool,
) -> Tensor:
    """`linear_attention`."""
    inputs = Inputs(q, k, v, g, beta)
    with _exactly(v):
        out: Tensor = _code(inputs).attend(inputs, Settings(lengths, parents, scale, delta, normalize))
    return out


@torch.library.custom_op("nybble::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],  # q, k, v, g, beta
    lengths: Sequence[int],
    parents: Sequence[int],
    scale: float,
    delta: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta, contiguous."""
    settings = Settings(lengths, parents, scale, delta, normalize)
    with _exactly(grad):
        dq, dk, dv, dg, dbeta = _code(Inputs(*inputs)).attend_backward(
            grad.to(inputs[2].dtype), Inputs(*inputs), settings
        )
    return dq, dk, dv, dg, dbeta


@linear_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


@linear_attention_backward.register_fake
def _(_grad: Tensor, inputs: Sequence[Tensor], *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.nybble.linear_attention_backward(grad, list(ctx.saved_tensors), *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


linear_attention_op.register_autograd(_backward, setup_context=_save)


# Short convolution


@torch.library.custom_op("nybble::short_convolution", mutates_args=())
def short_convolution_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, lengths: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """`short_convolution`."""
    out: Tensor = _filter_code(x).convolve(x, weight, bias, silu, lengths, parents)
    return out


@torch.library.custom_op("nybble::short_convolution_backward", mutates_args=())
def short_convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    lengths: Sequence[int],
    parents: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, contiguous."""
    settings = (silu, lengths, parents)
    dx, d_weight, d_bias = _filter_code(x).convolve_backward(grad.to(x.dtype), x, weight, bias, *settings)
    return dx, d_weight.to(weight.dtype).contiguous(), d_bias.to(weight.dtype)


@short_convolution_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@short_convolution_backward.register_fake
def _(_grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *settings = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.settings = settings


def _backward_of_convolution(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, d_weight, d_bias = torch.ops.nybble.short_convolution_backward(grad, x, weight, bias, *ctx.settings)
    return dx, d_weight, None if bias is None else d_bias, None, None, None


short_convolution_op.register_autograd(_backward_of_convolution, setup_context=_save_convolution)


# Selective scan


@torch.library.custom_op("nybble::selective_scan", mutates_args=())
def selective_scan_op(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, lengths: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """`selective_scan`."""
    with _exactly(x):
        return reference.scan(ScanInputs(x, dt, a, b, c), lengths, parents)


@torch.library.custom_op("nybble::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad: Tensor, inputs: Sequence[Tensor], lengths: Sequence[int], parents: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b and c, contiguous."""
    with _exactly(grad):
        grads = reference.scan_backward(grad, ScanInputs(*inputs), lengths, parents)
    dx, d_dt, da, db, dc = (part.to(x.dtype) for part, x in zip(grads, inputs, strict=True))
    return dx, d_dt, da, db, dc


@selective_scan_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@selective_scan_backward.register_fake
def _(_grad: Tensor, inputs: Sequence[Tensor], *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward_of_scan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.nybble.selective_scan_backward(grad, list(ctx.saved_tensors), *ctx.settings)
    return (*grads, None, None)


selective_scan_op.register_autograd(_backward_of_scan, setup_context=_save_scan)
