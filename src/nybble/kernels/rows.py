"""Operators between the products of a training step: norms, gates, dropout, rotary positions, the loss of a row.

Schema, fake, and the path that each device takes (`row_paths`); `plain_rows` says what each result must be. What fast
paths do not take goes the plain way: types other than float32, float16 and bfloat16, mixed types, memory with gaps.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor

from nybble.kernels import plain_rows
from nybble.kernels.eager import is_eager
from nybble.kernels.row_paths import TOLERANCES, RowPath, path_for

_PLAIN = cast(RowPath, plain_rows)


def _path(first: Tensor, *others: Tensor) -> RowPath:
    """The path for these activations."""
    kind = (first.dtype, first.shape)
    alike = all((other.dtype, other.shape) == kind and other.is_contiguous() for other in others)
    fits = alike and first.dtype in TOLERANCES and first.is_contiguous() and first.numel() > 0
    return path_for(first.device) if fits else _PLAIN


def direct(first: Tensor, *others: Tensor) -> RowPath:
    """For activations like these: the path itself where nobody traces or differentiates, else these operators."""
    return _path(first, *others) if is_eager(first, *others) else cast(RowPath, sys.modules[__name__])


def glance(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one token of each row `(n, heads, width)` to the cached ones, `(n, kv_heads, tokens, width)`."""
    alike = q.dtype == k.dtype == v.dtype and is_eager(q, k, v)
    return (_path(q) if alike else _PLAIN).glance(q, k, v, scale)


@torch.library.custom_op("nybble::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    """The normalised rows, and 1 / rms `(n,) float32`."""
    return _path(x).rms_norm(x, weight, eps, one_plus)


@torch.library.custom_op("nybble::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, one_plus: bool) -> Tensor:
    """dL/dx of `rms_norm`."""
    return _path(grad, x).rms_norm_backward(grad, x, weight, rstd, one_plus)


@torch.library.custom_op("nybble::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up."""
    return _path(gate, up).gated(gate, up, activation)


@torch.library.custom_op("nybble::gated_backward_", mutates_args=("grad", "gate", "up"))
def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: grad becomes `gated(gate, up)`, gate and up become their gradients."""
    _path(grad, gate, up).gated_backward_(grad, gate, up, activation)


@torch.library.custom_op("nybble::dropout", mutates_args=("out",))
def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """Dropout by hash of `seed` and place into `out`, which is of the shape and type of x."""
    _path(x, out).dropout(x, p, seed, out)


@torch.library.custom_op("nybble::dropout_add_", mutates_args=("total",))
def dropout_add_(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    """total += dropout(x)."""
    _path(total, x).dropout_add_(total, x, p, seed)


@torch.library.custom_op("nybble::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """Loss of each row `(n,) float32`; logits become their gradients."""
    return _path(logits).cross_entropy_(logits, labels, softcap)


@torch.library.custom_op("nybble::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x `(n, heads, width)` turned to its positions, or back."""
    each_row = cos.shape == sin.shape == (x.shape[0], cos.shape[-1])
    return (_path(x[:1, :1]) if each_row else _PLAIN).rope(x, cos, sin, inverse)  # heads and rows may lie apart


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, one_plus: bool) -> Tensor:
    return torch.empty_like(x)


@gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


@gated_backward_.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    return None


@dropout.register_fake
def _(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    return None


@dropout_add_.register_fake
def _(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    return None


@cross_entropy_.register_fake
def _(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)
