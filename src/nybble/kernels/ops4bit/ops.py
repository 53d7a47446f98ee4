"""Operators on packed weights: schema, fake, and the backend that each device takes.

    dequantize_4bit       packed weight -> numbers
    dequantize_4bit_out   the same into a buffer that the caller reuses
    gemv_4bit             x W^T for a few rows of x (generation), W never written out
    quantize_4bit         numbers -> packed weight

The fakes let the same code run on tensors without data (tracing, planning). `nybble.quant` says what each result
must be; `nybble.kernels.dispatch` gives the backend, a module with the functions of `Ops4bitBackend`. Where nobody
traces or differentiates, the functions here hand the packed weight to the backend as it is: the operators, which take
tensors alone, are for torch's tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from nybble.kernels.dispatch import dispatcher
from nybble.kernels.eager import is_eager
from nybble.kernels.ops4bit import torch as reference
from nybble.kernels.ops4bit.backend import Ops4bitBackend
from nybble.kernels.ops4bit.torch import LowRank
from nybble.quant import PackedWeight, encode, encode_searched

ENCODERS = ("absmax", "search")


def _backend(operator: str, device: torch.device) -> Ops4bitBackend:
    return dispatcher.code(operator, device)  # type: ignore[no-any-return]


def dequantize(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`weight` as numbers: `weight.shape` in `dtype`, bit-identical to `nybble.quant.decode`.

    Args:
        weight: what to decode.
        dtype: float32, float16 or bfloat16.
        out: contiguous memory for the result, of that shape, type and device.
    """
    if out is not None and (out.shape != weight.shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous {weight.shape} {dtype}, got {tuple(out.shape)} {out.dtype}")
    if is_eager(weight.packed) and weight.packed.device.type != "meta":
        decoded = weight.packed.new_empty(weight.shape, dtype=dtype) if out is None else out
        if is_eager(decoded):
            _backend("dequantize_4bit", decoded.device).dequantize(weight, decoded)
            return decoded
    arguments = (*_tensors(weight), weight.quant_type, weight.block_size)
    if out is None:
        result: Tensor = torch.ops.nybble.dequantize_4bit(*arguments, weight.shape, dtype)
        return result
    torch.ops.nybble.dequantize_4bit_out(*arguments, out)
    return out


def most_rows(x: Tensor, weight: PackedWeight) -> int:
    """Rows up to which `multiply` is the fastest way to x W^T."""
    return _backend("gemv_4bit", x.device).most_rows(x.dtype, weight)


def multiply(x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
    """x (W + s B A)^T for up to 8 rows, or `most_rows`: `(rows, out_features)` in the type of x. No gradients."""
    if is_eager(x, weight.packed):
        return _backend("gemv_4bit", x.device).multiply(x.contiguous(), weight, low_rank)
    result: Tensor = torch.ops.nybble.gemv_4bit(
        x, *_tensors(weight), weight.quant_type, weight.block_size, weight.shape[0]
    )
    return result if low_rank is None else low_rank.added(result, x)


def multiply_dense(x: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """The same for up to 8 rows and W `(out_features, in_features)` of the type of x."""
    if is_eager(x, weight):
        return _backend("gemv_4bit", x.device).multiply_dense(x.contiguous(), weight, low_rank)
    return reference.multiply_dense(x, weight, low_rank)


def quantize(
    weight: Tensor,  # any shape, float32, float16 or bfloat16
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    encoder: str = "search",
    signed: bool = True,
) -> PackedWeight:
    """Pack a weight: `absmax` as `nybble.quant.encode` does, `search` as `nybble.quant.encode_searched` does.

    Raises:
        ValueError: encoder, block size or type not supported, or a weight that is not finite.
    """
    packed, absmax, nested_absmax, nested_offset = torch.ops.nybble.quantize_4bit(
        weight, quant_type, block_size, double_quant, encoder, signed
    )
    nested = (nested_absmax, nested_offset.view(())) if double_quant else (None, None)
    return PackedWeight(packed, absmax, tuple(weight.shape), block_size, quant_type, weight.dtype, *nested)


@torch.library.custom_op("nybble::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    packed: Tensor,  # (ceil(n / 2), 1) uint8
    absmax: Tensor,  # (n_blocks,) float32, or uint8 with the two below
    nested_absmax: Tensor | None,  # (ceil(n_blocks / 256),) float32
    nested_offset: Tensor | None,  # () float32
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a packed weight to `shape` in `dtype`; see `nybble.quant.packed` for the layout."""
    out = packed.new_empty(tuple(shape), dtype=dtype)
    weight = PackedWeight(packed, absmax, tuple(shape), block_size, quant_type, dtype, nested_absmax, nested_offset)
    _backend("dequantize_4bit", packed.device).dequantize(weight, out)
    return out


@torch.library.custom_op("nybble::dequantize_4bit_out", mutates_args=("out",))
def dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out: Tensor,  # contiguous; its shape and type are the result's
) -> None:
    """Decode a packed weight into `out`."""
    shape = tuple(out.shape)
    weight = PackedWeight(packed, absmax, shape, block_size, quant_type, out.dtype, nested_absmax, nested_offset)
    _backend("dequantize_4bit", packed.device).dequantize(weight, out)


@torch.library.custom_op("nybble::gemv_4bit", mutates_args=())
def gemv_4bit(
    x: Tensor,  # (rows, in_features), 8 rows at most or `most_rows`; float32, float16 or bfloat16
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out_features: int,
) -> Tensor:
    """x W^T, `(rows, out_features)` in the type of x."""
    shape = (out_features, x.shape[1])
    weight = PackedWeight(packed, absmax, shape, block_size, quant_type, x.dtype, nested_absmax, nested_offset)
    return _backend("gemv_4bit", packed.device).multiply(x.contiguous(), weight)


@torch.library.custom_op("nybble::quantize_4bit", mutates_args=())
def quantize_4bit(
    weight: Tensor, quant_type: str, block_size: int, double_quant: bool, encoder: str, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, nested scales and offset; the last two are empty without double quantization."""
    if encoder == "search":
        backend = _backend("quantize_4bit", weight.device)
        made = encode_searched(weight, quant_type, block_size, double_quant, signed, backend)
    elif encoder == "absmax":
        made = encode(weight, quant_type, block_size, double_quant)
    else:
        raise ValueError(f"encoder must be one of {ENCODERS}, got {encoder!r}")
    packed, absmax, nested_absmax, nested_offset = _tensors(made)
    if nested_absmax is None or nested_offset is None:
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    return packed, absmax, nested_absmax, nested_offset.view(1)


@dequantize_4bit.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    torch._check(packed.dtype == torch.uint8, lambda: f"packed must be uint8, got {packed.dtype}")
    torch._check(packed.numel() == (prod(shape) + 1) // 2, lambda: f"{packed.numel()} bytes do not hold {shape}")
    return packed.new_empty(tuple(shape), dtype=dtype)


@dequantize_4bit_out.register_fake
def _(*_: object) -> None:
    return None


@gemv_4bit.register_fake
def _(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], rest[-1])  # type: ignore[call-overload,no-any-return]


@quantize_4bit.register_fake
def _(
    weight: Tensor, quant_type: str, block_size: int, double_quant: bool, encoder: str, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = weight.numel()
    blocks = -(-n // block_size)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(-(-blocks // 256) if double_quant else 0, dtype=torch.float32)
    offset = weight.new_empty(int(double_quant), dtype=torch.float32)
    return weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8), absmax, nested, offset


def _tensors(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset
