"""Operators between the products of a training step: norms, gates, dropout, rotary positions, the loss of a row.

Each has a schema, a fake and the backend that `nybble.kernels.dispatch` gives for the device; `pointwise.torch` says
what each result must be. What fast backends do not take goes to the torch backend: types other than float32, float16
and bfloat16, mixed types, memory with gaps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nybble.kernels.dispatch import dispatcher
from nybble.kernels.eager import is_eager
from nybble.kernels.pointwise import torch as reference
from nybble.kernels.pointwise.backend import PointwiseBackend
from nybble.kernels.pointwise.self_test import TOLERANCES

_REFERENCE: PointwiseBackend = reference


def _backend(first: Tensor, *others: Tensor) -> PointwiseBackend:
    """The backend for these activations."""
    kind = (first.dtype, first.shape)
    alike = all((other.dtype, other.shape) == kind and other.is_contiguous() for other in others)
    fits = alike and first.dtype in TOLERANCES and first.is_contiguous() and first.numel() > 0
    return dispatcher.code("rows", first.device) if fits else _REFERENCE


def direct(first: Tensor, *others: Tensor) -> PointwiseBackend:
    """For activations like these: the backend itself where nobody traces or differentiates, else the operators."""
    return _backend(first, *others) if is_eager(first, *others) and not first.is_meta else REGISTERED


def direct_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """`direct(..).rope` for heads and rows of x that may lie apart."""
    return _rope_backend(x, cos, sin).rope if is_eager(x, cos, sin) and not x.is_meta else REGISTERED.rope


def _rope_backend(x: Tensor, cos: Tensor, sin: Tensor) -> PointwiseBackend:
    each_row = cos.shape == sin.shape == (x.shape[0], cos.shape[-1])
    fits = each_row and x.dtype in TOLERANCES and x.stride(-1) == 1 and x.numel() > 0
    return dispatcher.code("rows", x.device) if fits else _REFERENCE


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one token of each row `(n, heads, width)` to the cached ones, `(n, kv_heads, tokens, width)`."""
    alike = q.dtype == k.dtype == v.dtype and is_eager(q, k, v)
    return (_backend(q) if alike else _REFERENCE).decode_attention(q, k, v, scale)


@torch.library.custom_op("nybble::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """The normalised rows, and 1 / rms `(n,) float32`."""
    return _backend(x).rms_norm(x, weight, eps, unit_offset)


@torch.library.custom_op("nybble::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """dL/dx of `rms_norm`."""
    return _backend(grad, x).rms_norm_backward(grad, x, weight, rstd, unit_offset)


@torch.library.custom_op("nybble::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up."""
    return _backend(gate, up).gated(gate, up, activation)


@torch.library.custom_op("nybble::gated_backward_", mutates_args=("grad", "gate", "up"))
def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: grad becomes `gated(gate, up)`, gate and up become their gradients."""
    _backend(grad, gate, up).gated_backward_(grad, gate, up, activation)


@torch.library.custom_op("nybble::dropout", mutates_args=("out",))
def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """Dropout by hash of `seed` and place into `out`, which is of the shape and type of x."""
    _backend(x, out).dropout(x, p, seed, out)


@torch.library.custom_op("nybble::dropout_add_", mutates_args=("total",))
def dropout_add_(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    """total += dropout(x)."""
    _backend(total, x).dropout_add_(total, x, p, seed)


@torch.library.custom_op("nybble::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """Loss of each row `(n,) float32`; logits become their gradients."""
    return _backend(logits).cross_entropy_(logits, labels, softcap)


@torch.library.custom_op("nybble::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x `(n, heads, width)` turned to its positions, or back."""
    return _rope_backend(x, cos, sin).rope(x, cos, sin, inverse)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
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


class _Registered:
    """The operators as torch sees them, in the shape of a backend."""

    NAME = "registered"
    rms_norm = staticmethod(rms_norm)
    rms_norm_backward = staticmethod(rms_norm_backward)
    gated = staticmethod(gated)
    gated_backward_ = staticmethod(gated_backward_)
    dropout = staticmethod(dropout)
    dropout_add_ = staticmethod(dropout_add_)
    cross_entropy_ = staticmethod(cross_entropy_)
    rope = staticmethod(rope)
    decode_attention = staticmethod(decode_attention)


REGISTERED: PointwiseBackend = _Registered()
