"""The pointwise operators on GPUs: launches of the kernels in `triton_kernels`, for AMD and NVIDIA alike.

Nothing is tuned at run time and nothing waits for the device. A thread moves 8 numbers at a time, so the number of
waves follows from the tile. Every function here takes what `pointwise.ops` hands on: float32, float16 or bfloat16, one
type, contiguous. Tensors on the CPU are taken where Triton interprets (TRITON_INTERPRET=1), which is how tests run
this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nybble.kernels.ops4bit.triton import NAME, as_bits, on, wave_of
from nybble.kernels.ops4bit.triton_kernels import OPTIONS
from nybble.kernels.pointwise import triton_kernels as kernels
from nybble.kernels.pointwise.torch import threshold

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
    pointers = (as_bits(x), as_bits(weight.contiguous()), as_bits(out), rstd)
    with on(x.device):
        kernels.rms_norm[(n,)](*pointers, width, eps, unit_offset=unit_offset, **_shape(width, x.device))
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """`pointwise.torch.rms_norm_backward`."""
    (n, width), out = x.shape, torch.empty_like(x)
    pointers = (as_bits(grad), as_bits(x), as_bits(weight.contiguous()), rstd.contiguous(), as_bits(out))
    with on(x.device):
        kernels.rms_norm_backward[(n,)](*pointers, width, unit_offset=unit_offset, **_shape(width, x.device))
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`pointwise.torch.gated`."""
    n, out, shape = gate.numel(), torch.empty_like(gate), _shape(kernels.TILE, gate.device)
    pointers = (as_bits(gate), as_bits(up), as_bits(out))
    with on(gate.device):
        kernels.gated[_programs(n)](*pointers, n, is_gelu=activation != "silu", **shape)
    return out


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """`pointwise.torch.gated_backward_`."""
    n, shape = gate.numel(), _shape(kernels.TILE, gate.device)
    pointers = (as_bits(grad), as_bits(gate), as_bits(up))
    with on(gate.device):
        kernels.gated_backward[_programs(n)](*pointers, n, is_gelu=activation != "silu", **shape)


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
    pointers = (as_bits(logits), labels.contiguous(), losses)
    with on(logits.device):
        kernels.cross_entropy[(n,)](
            *pointers, width, float(softcap), is_capped=softcap > 0, **_shape(width, logits.device)
        )
    return losses


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`pointwise.torch.decode_attention`, by torch's own attention."""
    shared = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=shared).squeeze(2)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`pointwise.torch.rope`; x may have strides."""
    n, heads, width = x.shape
    rotated, out = cos.shape[-1], x.new_empty(x.shape)
    pairs, rest = _power(rotated // 2), _power(width - rotated) if width > rotated else 0
    tile = max(1, min(kernels.TILE // pairs, _power(heads)))
    pointers = (as_bits(x), as_bits(cos.contiguous()), as_bits(sin.contiguous()), as_bits(out))
    with on(x.device):
        kernels.rope[(n, -(-heads // tile))](
            *pointers,
            heads,
            width,
            rotated // 2,
            x.stride(0),
            x.stride(1),
            inverse=inverse,
            pairs=pairs,
            rest=rest,
            **{**_shape(tile * pairs, x.device), "tile": tile},
        )
    return out


def _drop(x: Tensor, p: float, seed: int, out: Tensor, adds: bool) -> None:
    n, shape = x.numel(), _shape(kernels.TILE, x.device)
    numbers = (_signed(seed), _signed(threshold(p)), 1 / (1 - p))
    with on(x.device):
        kernels.dropout[_programs(n)](as_bits(x), as_bits(out), n, *numbers, adds=adds, **shape)


def _signed(number: int) -> int:
    """The int32 with the low 32 bits of a number: every seed is then of one type to the compiler."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _shape(numbers: int, device: torch.device) -> dict[str, object]:
    """Tile and waves for a program that handles this many numbers, and the compiler's options."""
    least = kernels.PER_THREAD * wave_of(device)
    tile = min(max(_power(numbers), least), kernels.TILE)
    return {"tile": tile, "num_warps": tile // least, **OPTIONS}


def _programs(n: int) -> tuple[int]:
    return (-(-n // kernels.TILE),)


def _power(number: int) -> int:
    """The power of two that is no less."""
    return 1 << (number - 1).bit_length()
