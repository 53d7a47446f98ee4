"""Encode and decode in plain torch: the reference. It is never optimised; faster backends are tested against it.

Bit-identical to bitsandbytes 0.50: scale = largest magnitude of the block, code = nearest value (the lower one at an
exact midpoint), decoded as `code * absmax` in float32 with one rounding to the target type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quant.codebooks import BLOCK_SIZES, codebook, dynamic_codebook
from nybble.quant.packed import NESTED_BLOCK_SIZE, PackedWeight

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 1 << 22  # weights encoded at a time: a multiple of every block size; it bounds the float32 copies to 0.1 GB
_TINY = 1e-38  # the divisor for a block of zeros, in place of zero


def encode(
    weight: Tensor,  # any shape, float32, float16 or bfloat16
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> PackedWeight:
    """Quantize a weight to 4 bits.

    Raises:
        ValueError: the block size or type is not supported, or the weight is not finite.
    """
    check_weight(weight, block_size)
    pieces = [_encode_piece(part, quant_type, block_size) for part in weight.detach().reshape(-1).split(_PIECE)]
    packed, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    plain = PackedWeight(packed.unsqueeze(1), absmax, tuple(weight.shape), block_size, quant_type, weight.dtype)
    return _nest(plain) if double_quant else plain


def check_weight(weight: Tensor, block_size: int) -> None:
    """Check that the weight can be packed.

    Raises:
        ValueError: it cannot; the message says what was given and what is allowed.
    """
    if weight.dtype not in _FLOATS:
        raise ValueError(f"can pack float32, float16 and bfloat16, got {weight.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size must be one of {BLOCK_SIZES}, got {block_size}")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has nothing to pack")
    # One pass without a copy; with a NaN, both the minimum and the maximum are NaN.
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise ValueError(f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} values are NaN or infinite")


def decode(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The decoded weight, `weight.shape` in `dtype` (default: the type that it had before packing)."""
    device = weight.packed.device
    nibbles = torch.stack([weight.packed.view(-1) >> 4, weight.packed.view(-1) & 0xF], dim=1).view(-1)
    values = codebook(weight.quant_type).to(device)[nibbles[: weight.n_elements].int()]
    absmax = decode_absmax(weight).repeat_interleave(weight.block_size)[: weight.n_elements]
    return (values * absmax).view(weight.shape).to(dtype or weight.dtype)


def decode_absmax(weight: PackedWeight) -> Tensor:
    """The scales of the blocks, `(n_blocks,) float32`; product and offset are rounded separately."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax
    values = dynamic_codebook().to(weight.absmax.device)[weight.absmax.view(-1).int()]
    scales = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.n_blocks]
    return values * scales + weight.nested_offset


def _encode_piece(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed bytes and scales of a sequence of whole blocks (the last may be shorter)."""
    scaled, absmax = _scale(flat.float(), block_size)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = _nearest_4bit(scaled, quant_type)
    return codes[::2] << 4 | codes[1::2], absmax


def _scale(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Values in [-1, 1] and the scale of each block; full blocks are multiplied by 1 / scale, short ones divided."""
    full = flat.numel() - flat.numel() % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
    if full == flat.numel():
        return scaled, absmax
    rest = flat[full:]
    rest_absmax = rest.abs().amax().clamp(min=_TINY)
    return torch.cat([scaled, (rest / rest_absmax).clamp(-1, 1)]), torch.cat([absmax, rest_absmax.unsqueeze(0)])


def _nearest_4bit(scaled: Tensor, quant_type: str) -> Tensor:
    values = codebook(quant_type)
    order = torch.argsort(values)
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    rank = torch.bucketize(scaled, midpoints.to(scaled.device))
    return order.to(torch.uint8).to(scaled.device)[rank]


def _nest(plain: PackedWeight) -> PackedWeight:
    offset = plain.absmax.mean()
    codes, nested_absmax = _encode_8bit(plain.absmax - offset)
    return PackedWeight(
        plain.packed, codes, plain.shape, plain.block_size, plain.quant_type, plain.dtype, nested_absmax, offset
    )


def _encode_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the 8-bit table and the scale of each run of 256, `(n,) uint8` and `(ceil(n / 256),) float32`.

    bitsandbytes on a CPU looks codes up by the value rounded to 65,536 steps over [-1, 1]; about one code in 700 is
    then the second nearest. Its GPU kernel takes the nearest. This function gives the CPU's bytes on every device, so
    that one weight has one encoding.
    """
    runs = torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    absmax = runs.abs().amax(dim=1)
    scaled = (runs * (1.0 / absmax).unsqueeze(1)).clamp(-1, 1)
    step = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).floor()
    table = dynamic_codebook().to(values.device)
    codes = torch.bucketize(-1.0 + (2.0 * step) / 65535.0, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    codes[absmax == 0] = 0
    return codes.view(-1)[: values.numel()], absmax
