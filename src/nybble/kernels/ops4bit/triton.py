"""The 4-bit operators on GPUs: launches of the Triton kernels, for AMD and NVIDIA alike.

Nothing is tuned at run time: a launch has the shape that `triton_kernels.LAUNCHES` gives for the width of the device's
waves. Tensors on the CPU are taken where Triton interprets (TRITON_INTERPRET=1), which is how tests run this module.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nybble.kernels.ops4bit import triton_kernels as kernels
from nybble.kernels.ops4bit.torch import LowRank, multiply_dense
from nybble.kernels.triton_launch import Launch
from nybble.quant import PackedWeight, codebook
from nybble.quant.codebooks import dynamic_codebook
from nybble.quant.feedback import descend, feed_back  # columns one after another: the products take the time
from nybble.quant.search import FACTORS, NEIGHBOURS

__all__ = [
    "NAME",
    "dequantize",
    "descend",
    "feed_back",
    "most_rows",
    "multiply",
    "multiply_dense",
    "nearest_codes",
    "nested_codes",
    "search_scales",
]

NAME = "triton"
MAX_ROWS = 8


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode `weight` into `out`, contiguous, of its shape; bit-identical to `nybble.quant.decode`."""
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    n = weight.n_elements
    tile, launch = _decoder(weight.is_nested, _log2(weight.block_size), wave_of(out.device))
    launch(_grid(n, tile * kernels.CHUNK.value), *_packed(weight), out, n)


def most_rows(dtype: torch.dtype, weight: PackedWeight) -> int:
    """Rows up to which `multiply` is taken for faster than a product with the decoded weight."""
    return 4


def multiply(x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
    """x (W + s B A)^T, `(rows, out_features)` in the type of x; W x in float32, W not rounded to that type before."""
    n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k or not 1 <= x.shape[0] <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x must be contiguous (1..{MAX_ROWS}, {k}), got {tuple(x.shape)} with strides {x.stride()}")
    n_rows = x.shape[0]
    out = x.new_empty(n_rows, n)
    launch = _gemv(weight.is_nested, _log2(weight.block_size), k % 8 == 0, n_rows, wave_of(x.device))
    launch(_grid(n, kernels.GEMV_OUTPUTS), x, *_packed(weight), out, n, k, n_rows)
    return out if low_rank is None else low_rank.added(out, x)


def search_scales(flat: Tensor, quant_type: str, block_size: int, signed: bool) -> Tensor:
    """The best scale of each block, `(n_blocks,) float32`; as `nybble.quant.search.search_scales`."""
    flat = flat.contiguous()
    n, blocks = flat.numel(), -(-flat.numel() // block_size)
    scales = flat.new_empty(blocks, dtype=torch.float32)
    factors, ladder = _factors(signed, flat.device), _ladder(quant_type, flat.device)
    tile, launch = _encoder("search_scales", block_size, wave_of(flat.device))
    launch(_grid(blocks, tile), flat, factors, *ladder[:2], scales, n, factors.numel())
    return scales


def nested_codes(
    flat: Tensor, quant_type: str, block_size: int, scales: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> Tensor:
    """For each block the 8-bit code of least error, `(n_blocks,) uint8`; as `nybble.quant.search.nested_codes`."""
    flat = flat.contiguous()
    n, blocks = flat.numel(), -(-flat.numel() // block_size)
    codes = flat.new_empty(blocks, dtype=torch.uint8)
    tile, launch = _encoder("nested_codes", block_size, wave_of(flat.device))
    tables = (*_dynamic_table(flat.device), *_ladder(quant_type, flat.device)[:2])
    steps = (scales.contiguous(), nested_absmax.contiguous(), nested_offset)
    launch(_grid(blocks, tile), flat, *steps, *tables, codes, n)
    return codes


def nearest_codes(flat: Tensor, quant_type: str, block_size: int, scales: Tensor) -> Tensor:
    """The nearest 4-bit codes for given scales, `(ceil(n / 2),) uint8`; as `nybble.quant.search.nearest_codes`."""
    flat = flat.contiguous()
    n = flat.numel()
    packed = flat.new_empty((n + 1) // 2, dtype=torch.uint8)
    _, midpoints, order = _ladder(quant_type, flat.device)
    tile, launch = _encoder("nearest_codes", block_size, wave_of(flat.device))
    launch(_grid(packed.numel(), tile), flat, scales.contiguous(), order, midpoints, packed, n)
    return packed


def _packed(weight: PackedWeight) -> tuple[Tensor, ...]:
    """What the kernels read of a weight, in their order; without nested scales a stand-in that they do not touch."""
    device = weight.packed.device
    packed, absmax = weight.packed.contiguous(), weight.absmax.contiguous()
    if packed.data_ptr() % 4:  # a view into something else: words are read, and NVIDIA refuses those across
        packed = packed.clone()
    nested, offset = weight.nested_absmax, weight.nested_offset
    values, table = _values(weight.quant_type, device), _dynamic_table(device)[0]
    if nested is None or offset is None:
        return packed, absmax, table, table, table, values
    return packed, absmax, table, nested.contiguous(), offset, values


def _grid(items: int, per_program: int) -> tuple[int, int]:
    return -(-items // per_program), 1


def _log2(block_size: int) -> int:
    return block_size.bit_length() - 1


@cache
def _decoder(nested: bool, log_block: int, wave: int) -> tuple[int, Launch]:
    """Chunks of a program, and the launch."""
    constants = {"nested": nested, "log_block": log_block}
    return _tile("dequantize"), Launch(kernels.dequantize, {**constants, **_shape("dequantize", wave)})


@cache
def _gemv(nested: bool, log_block: int, aligned: bool, n_rows: int, wave: int) -> Launch:
    constants = {"nested": nested, "log_block": log_block, "aligned": aligned, "rows": 1 << (n_rows - 1).bit_length()}
    shape = _shape("gemv" if aligned and n_rows <= 2 else "gemv many", wave)
    return Launch(kernels.gemv, {**constants, "outputs": kernels.GEMV_OUTPUTS, **shape})


@cache
def _encoder(name: str, block_size: int, wave: int) -> tuple[int, Launch]:
    """Blocks or bytes of a program, and the launch."""
    block = {"log_block": _log2(block_size)} if name == "nearest_codes" else {"block_size": block_size}
    constants = {"neighbours": NEIGHBOURS, **block} if name == "nested_codes" else block
    return _tile(name), Launch(getattr(kernels, name), {**constants, **_shape(name, wave)}, reads_bits=False)


def _tile(kernel: str) -> int:
    return kernels.LAUNCHES[kernel].tile


def _shape(kernel: str, wave: int) -> dict[str, object]:
    """Tile and number of waves of a kernel's launch, and the compiler's options."""
    return {"tile": _tile(kernel), "num_warps": kernels.LAUNCHES[kernel].warps[wave], **kernels.OPTIONS}


@cache
def wave_of(device: torch.device) -> int:
    """Threads in a wave."""
    return 32 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).warp_size)


@cache
def _values(quant_type: str, device: torch.device) -> Tensor:
    return codebook(quant_type).to(device)


@cache
def _dynamic_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 8-bit table, `(256,) float32`, and what lies between its values, `(255,) float32`."""
    table = dynamic_codebook()
    return table.to(device), ((table[:-1] + table[1:]) / 2).to(device)


@cache
def _ladder(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A 4-bit table in ascending order, `(16,) float32`, its midpoints, `(15,) float32`, its codes, `(16,) int32`."""
    values = codebook(quant_type)
    order = torch.argsort(values, stable=True)
    ascending = values[order]
    return ascending.to(device), ((ascending[:-1] + ascending[1:]) / 2).to(device), order.int().to(device)


@cache
def _factors(signed: bool, device: torch.device) -> Tensor:
    """What absmax is multiplied by, in the order in which equals are resolved, float32."""
    signs = (1.0, -1.0) if signed else (1.0,)
    return torch.tensor([sign * factor for sign in signs for factor in FACTORS], dtype=torch.float32).to(device)
