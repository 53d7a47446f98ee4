"""The pointwise operators on GPUs: launches of the kernels in `triton_kernels`, for AMD and NVIDIA alike.

Nothing is tuned at run time and nothing waits for the device. A thread moves 8 numbers at a time, so the number of
waves follows from the tile. Every function here takes what `pointwise.ops` hands on: float32, float16 or bfloat16, one
type, contiguous. Tensors on the CPU are taken where Triton interprets (TRITON_INTERPRET=1), which is how tests run
this.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels.ops4bit.triton import NAME, wave_of
from nybble.kernels.ops4bit.triton_kernels import OPTIONS
from nybble.kernels.pointwise import triton_kernels as kernels
from nybble.kernels.pointwise.torch import threshold
from nybble.kernels.triton_launch import Launch

__all__ = [
    "NAME",
    "cross_entropy_",
    "decode_attention",
    "dropout",
    "dropout_add_",
    "gated",
    "gated_backward_",
    "rms_norm",
    "rms_norm_backward",
    "rope",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """`pointwise.torch.rms_norm`."""
    (n, width), out = x.shape, torch.empty_like(x)
    rstd = x.new_empty(n, dtype=torch.float32)
    launch = _launch(kernels.rms_norm, width, wave_of(x.device), "unit_offset", unit_offset)
    launch((n, 1), x, weight.contiguous(), out, rstd, width, eps)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """`pointwise.torch.rms_norm_backward`."""
    (n, width), out = x.shape, torch.empty_like(x)
    launch = _launch(kernels.rms_norm_backward, width, wave_of(x.device), "unit_offset", unit_offset)
    launch((n, 1), grad, x, weight.contiguous(), rstd.contiguous(), out, width)
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`pointwise.torch.gated`."""
    n, out = gate.numel(), torch.empty_like(gate)
    launch = _launch(kernels.gated, kernels.TILE, wave_of(gate.device), "is_gelu", activation != "silu")
    launch(_programs(n), gate, up, out, n)
    return out


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """`pointwise.torch.gated_backward_`."""
    n = gate.numel()
    launch = _launch(kernels.gated_backward, kernels.TILE, wave_of(gate.device), "is_gelu", activation != "silu")
    launch(_programs(n), grad, gate, up, n)


def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """`pointwise.torch.dropout`."""
    _drop(x, p, seed, out, adds=False)


def dropout_add_(total: Tensor, x: Tensor, p: float, seed: int) -> None:
    """`pointwise.torch.dropout_add_`."""
    _drop(x, p, seed, total, adds=True)


def cross_entropy_(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """`pointwise.torch.cross_entropy_`; the loss is NaN where a label is not the index of a logit."""
    n, width = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    launch = _launch(kernels.cross_entropy, width, wave_of(logits.device), "is_capped", softcap > 0)
    launch((n, 1), logits, labels.contiguous(), losses, width, float(softcap))
    return losses


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`pointwise.torch.decode_attention`, by torch's own attention."""
    shared = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=shared).squeeze(2)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`pointwise.torch.rope`; x may have strides."""
    (n, heads, width), rotated = x.shape, cos.shape[-1]
    out = x.new_empty(x.shape)
    tile, launch = _rope_launch(heads, width, rotated, wave_of(x.device), inverse)
    row_stride, head_stride, _ = x.stride()
    grid = (n, -(-heads // tile))
    launch(grid, x, cos.contiguous(), sin.contiguous(), out, heads, width, rotated // 2, row_stride, head_stride)
    return out


def _drop(x: Tensor, p: float, seed: int, out: Tensor, adds: bool) -> None:
    n, launch = x.numel(), _launch(kernels.dropout, kernels.TILE, wave_of(x.device), "adds", adds)
    launch(_programs(n), x, out, n, _signed(seed), _threshold(p), 1 / (1 - p))


@cache
def _threshold(p: float) -> int:
    return _signed(threshold(p))


def _signed(number: int) -> int:
    """The int32 with the low 32 bits of a number: every seed is then of one type to the compiler."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@cache
def _launch(kernel: Any, numbers: int, wave: int, constant: str, value: bool) -> Launch:
    """The launch of a kernel whose program handles this many numbers, with its one constant."""
    return Launch(kernel, {constant: value, **_shape(numbers, wave)})


@cache
def _rope_launch(heads: int, width: int, rotated: int, wave: int, inverse: bool) -> tuple[int, Launch]:
    """The heads of a program, and the launch."""
    pairs, rest = _power(rotated // 2), _power(width - rotated) if width > rotated else 0
    tile = max(1, min(kernels.TILE // pairs, _power(heads)))
    constants = {"inverse": inverse, "pairs": pairs, "rest": rest}
    return tile, Launch(kernels.rope, {**constants, **_shape(tile * pairs, wave), "tile": tile})


def _shape(numbers: int, wave: int) -> dict[str, object]:
    """Tile and waves for a program that handles this many numbers, and the compiler's options."""
    least = kernels.PER_THREAD * wave
    tile = min(max(_power(numbers), least), kernels.TILE)
    return {"tile": tile, "num_warps": tile // least, **OPTIONS}


def _programs(n: int) -> tuple[int, int]:
    return -(-n // kernels.TILE), 1


def _power(number: int) -> int:
    """The power of two that is no less."""
    return 1 << (number - 1).bit_length()
