"""The 4-bit operators in native code: the loops of `csrc/ops4bit.c`, single-threaded over a range of blocks.

Results have the bits of the reference whatever the instruction set and the number of threads; only products differ: the
sums of `multiply` in their last places, and in bfloat16, on processors with instructions for it, as products with a
rounded weight do.
"""

from __future__ import annotations

import ctypes
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nybble.kernels.library import DTYPES, INSTRUCTION_SETS, MANY_ROWS, MAX_ROWS, load_library, split
from nybble.kernels.ops4bit import torch as reference
from nybble.kernels.ops4bit.torch import LowRank
from nybble.quant import PackedWeight, codebook, dynamic_codebook
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

NAME = "native"
_MOVED = 1 << 22  # weights a thread should have to decode (0.3 ms): fewer are not worth waking it
_MULTIPLIED = 1 << 18  # the same for products, whose threads are awake
_TRIED = 1 << 16  # the same for the encoder's loops
# The 16 values are multiplied in bfloat16 as multiples of these, which round best: those of NF4 by .085 % (root mean
# square; as they are, by .14 %, and decoded weights by .11 %), those of FP4 not at all.
_UNITS = {"nf4": 1 / 1.4367523, "fp4": 1 / 192}
_SPREAD = 1 << 20  # the same for the products of its error feedback
_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class _Tables(ctypes.Structure):
    _fields_ = (
        ("lut", ctypes.c_float * 16),
        ("ascending", ctypes.c_float * 16),
        ("tree", ctypes.c_float * 16),
        ("midpoints", ctypes.c_float * 16),
        ("order", ctypes.c_int32 * 16),
        ("rounded", ctypes.c_uint16 * 32),
        ("unit", ctypes.c_float),
    )


class _Source(ctypes.Structure):
    _fields_ = (("data", _Pointer), ("n", _Size), ("block", _Size), ("dtype", _Size), ("tables", _Pointer))


class _Packed(ctypes.Structure):
    _fields_ = (
        ("codes", _Pointer),
        ("absmax", _Pointer),
        ("absmax8", _Pointer),
        ("nested", _Pointer),
        ("table8", _Pointer),
        ("offset", ctypes.c_float),
        ("n", _Size),
        ("block", _Size),
        ("tables", _Pointer),
    )


class _Nested(ctypes.Structure):
    _fields_ = (
        ("wanted", _Pointer),
        ("nested", _Pointer),
        ("table8", _Pointer),
        ("midpoints", _Pointer),
        ("offset", ctypes.c_float),
        ("neighbours", _Size),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("packed", _Pointer),
        ("dense", _Pointer),
        ("x", _Pointer),
        ("out", _Pointer),
        ("dtype", _Size),
        ("rows", _Size),
        ("in_features", _Size),
        ("out_features", _Size),
        ("a", _Pointer),
        ("b", _Pointer),
        ("rank", _Size),
        ("scaling", ctypes.c_float),
        ("wide", _Pointer),
        ("stride", _Size),
        ("inner", _Pointer),
    )


class _Columns(ctypes.Structure):
    _fields_ = (
        ("scales", _Pointer),
        ("factor", _Pointer),
        ("stride", _Size),
        ("n", _Size),
        ("outputs", _Size),
        ("tables", _Pointer),
    )


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode `weight` into `out`, contiguous, of its shape; types other than the three go to the torch backend."""
    if out.dtype not in DTYPES:
        reference.dequantize(weight, out)
        return
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    packed, kept = _packed(weight)
    library, number, address = load_library(), DTYPES[out.dtype], out.data_ptr()

    def run(first: int, last: int) -> None:
        library.nybble_decode(ctypes.byref(packed), number, address, first, last)

    split(run, weight.n_blocks, weight.n_elements // _MOVED)
    del kept


def most_rows(dtype: torch.dtype, weight: PackedWeight) -> int:
    """Rows of `dtype` up to which `multiply` beats a product with the decoded weight.

    In bfloat16 instructions a few features at a time are decoded: a prompt of 64 takes 0.24 s against 0.27 s.
    """
    is_even = weight.shape[1] % weight.block_size == 0
    many = is_even and dtype == torch.bfloat16 and load_library().nybble_isa() == INSTRUCTION_SETS.index("AVX512-BF16")
    return MANY_ROWS if many else MAX_ROWS


def multiply(x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
    """x (W + s B A)^T, `(rows, out_features)` in the type of x; W is decoded a few KiB at a time, never written out."""
    if x.dtype not in DTYPES or not 1 <= x.shape[0] <= most_rows(x.dtype, weight):
        return reference.multiply(x, weight, low_rank)
    packed, _kept = _packed(weight)
    return _multiply(x, weight.shape[0], ctypes.addressof(packed), None, low_rank)


def multiply_dense(x: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """The same for W `(out_features, in_features)` in the type of x."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype or not 1 <= x.shape[0] <= MAX_ROWS:
        return reference.multiply_dense(x, weight, low_rank)
    weight = weight.contiguous()
    return _multiply(x, weight.shape[0], None, weight.data_ptr(), low_rank)


def _multiply(x: Tensor, n: int, packed: int | None, dense: int | None, low_rank: LowRank | None) -> Tensor:
    """The product by the library, for W at one of two addresses; its memory is alive in the caller."""
    rows, k = x.shape
    out = x.new_empty(rows, n)
    product = _Product(packed, dense, x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], rows, k, n)
    added = low_rank if rows <= MAX_ROWS else None
    if added is not None:
        a, b = (factor.float().contiguous() for factor in added[:2])
        product.a, product.b, product.rank, product.scaling = a.data_ptr(), b.data_ptr(), a.shape[0], added.scaling
    threads = min(torch.get_num_threads(), 1 + n * k // _MULTIPLIED)
    if load_library().nybble_multiply(ctypes.byref(product), threads):
        raise MemoryError(f"no memory for {rows} rows of {k} numbers")
    return out if low_rank is None or added is not None else low_rank.added(out, x)


def search_scales(flat: Tensor, quant_type: str, block_size: int, signed: bool) -> Tensor:
    """`nybble.quant.search.search_scales`."""
    source, kept = _source(flat, quant_type, block_size)
    scales = flat.new_empty(-(-flat.numel() // block_size), dtype=torch.float32)
    signs = (1.0, -1.0) if signed else (1.0,)
    tried = [sign * factor for sign in signs for factor in FACTORS]
    factors = torch.tensor(tried, dtype=torch.float32, device="cpu")
    library, wanted, address = load_library(), factors.data_ptr(), scales.data_ptr()

    def run(first: int, last: int) -> None:
        library.nybble_search(ctypes.byref(source), wanted, factors.numel(), address, first, last)

    split(run, scales.numel(), flat.numel() // _TRIED)
    del kept
    return scales


def nested_codes(
    flat: Tensor, quant_type: str, block_size: int, scales: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> Tensor:
    """`nybble.quant.search.nested_codes`."""
    source, kept = _source(flat, quant_type, block_size)
    scales, nested_absmax = scales.contiguous(), nested_absmax.contiguous()
    codes = flat.new_empty(scales.numel(), dtype=torch.uint8)
    table, midpoints = _table8()
    pointers = (scales.data_ptr(), nested_absmax.data_ptr(), table.data_ptr(), midpoints.data_ptr())
    nested = _Nested(*pointers, nested_offset.item(), NEIGHBOURS)
    library, address = load_library(), codes.data_ptr()

    def run(first: int, last: int) -> None:
        library.nybble_nested(ctypes.byref(source), ctypes.byref(nested), address, first, last)

    split(run, codes.numel(), flat.numel() // _TRIED)
    del kept
    return codes


def nearest_codes(flat: Tensor, quant_type: str, block_size: int, scales: Tensor) -> Tensor:
    """`nybble.quant.search.nearest_codes`."""
    source, kept = _source(flat, quant_type, block_size)
    scales = scales.contiguous()
    packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    library, given, address = load_library(), scales.data_ptr(), packed.data_ptr()

    def run(first: int, last: int) -> None:
        library.nybble_nearest(ctypes.byref(source), given, address, first, last)

    split(run, scales.numel(), flat.numel() // _TRIED)
    del kept
    return packed


def feed_back(left: Tensor, upper: Tensor, scales: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """`nybble.quant.feedback.feed_back`."""
    if not _has_columns(left, upper, scales):
        return reference.feed_back(left, upper, scales, quant_type)
    columns = _columns(left, upper, scales, quant_type)
    chosen, errors = torch.empty_like(left), torch.empty_like(left)
    library, addresses = load_library(), (left.data_ptr(), chosen.data_ptr(), errors.data_ptr())

    def run(first: int, last: int) -> None:
        library.nybble_feed_back(ctypes.byref(columns), *addresses, first, last)

    split(run, left.shape[1], left.numel() * len(left) // _SPREAD)
    return chosen, errors


def descend(chosen: Tensor, pull: Tensor, moments: Tensor, scales: Tensor, quant_type: str) -> Tensor:
    """`nybble.quant.feedback.descend`."""
    if not (_has_columns(chosen, moments, scales) and _has_columns(pull, moments, scales)):
        return reference.descend(chosen, pull, moments, scales, quant_type)
    columns = _columns(chosen, moments, scales, quant_type)
    moved = torch.empty_like(chosen)
    library, addresses = load_library(), (chosen.data_ptr(), pull.data_ptr(), moved.data_ptr())

    def run(first: int, last: int) -> None:
        library.nybble_descend(ctypes.byref(columns), *addresses, first, last)

    split(run, chosen.shape[1], chosen.numel() * len(chosen) // _SPREAD)
    return moved


def _has_columns(values: Tensor, factor: Tensor, scales: Tensor) -> bool:
    """Whether the library can take them: in float32, each column's outputs side by side."""
    return (
        factor.stride(1) == 1
        and all(x.dtype == torch.float32 for x in (values, factor, scales))
        and all(x.is_contiguous() for x in (values, scales))
    )


def _columns(values: Tensor, factor: Tensor, scales: Tensor, quant_type: str) -> _Columns:
    pointers = (scales.data_ptr(), factor.data_ptr())
    return _Columns(*pointers, factor.stride(0), *values.shape, ctypes.addressof(_tables(quant_type)))


def _source(flat: Tensor, quant_type: str, block_size: int) -> tuple[_Source, Tensor]:
    """The library's view of weights to encode, and what must live as long as it is used."""
    flat = flat.contiguous()
    tables = ctypes.addressof(_tables(quant_type))
    return _Source(flat.data_ptr(), flat.numel(), block_size, DTYPES[flat.dtype], tables), flat


_View = tuple[_Packed, tuple[Tensor, ...]]
_views: WeakKeyDictionary[PackedWeight, tuple[tuple[int, int], _View]] = WeakKeyDictionary()


def _packed(weight: PackedWeight) -> _View:
    """The library's view of a packed weight, and what must live as long as it is used; made once."""
    where = (weight.packed.data_ptr(), weight.absmax.data_ptr())  # memory may be freed and allocated again
    kept = _views.get(weight)
    if kept is None or kept[0] != where:
        kept = _views[weight] = (where, _view(weight))
    return kept[1]


def _view(weight: PackedWeight) -> _View:
    codes, absmax = weight.packed.contiguous(), weight.absmax.contiguous()
    tables = ctypes.addressof(_tables(weight.quant_type))
    sizes = (weight.n_elements, weight.block_size, tables)
    if weight.nested_absmax is None or weight.nested_offset is None:
        return _Packed(codes.data_ptr(), absmax.data_ptr(), None, None, None, 0.0, *sizes), (codes, absmax)
    nested, table = weight.nested_absmax.contiguous(), _table8()[0]
    pointers = (codes.data_ptr(), None, absmax.data_ptr(), nested.data_ptr(), table.data_ptr())
    return _Packed(*pointers, weight.nested_offset.item(), *sizes), (codes, absmax, nested)


@cache
def _tables(quant_type: str) -> _Tables:
    values = codebook(quant_type)
    order = torch.argsort(values, stable=True)
    ascending = values[order]
    midpoints = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    # Level by level: node k of the tree halves what node k // 2 left of the ranks.
    tree = [0.0] + [midpoints[(2 * i + 1) * (8 >> level) - 1] for level in range(4) for i in range(1 << level)]
    rows = (values.tolist(), ascending.tolist(), tree, [*midpoints, 0.0])
    unit = _UNITS[quant_type]
    rounded = (values / unit).bfloat16().view(torch.int16).tolist()
    return _Tables(
        *((ctypes.c_float * 16)(*row) for row in rows),
        (ctypes.c_int32 * 16)(*order.tolist()),
        (ctypes.c_uint16 * 32)(*rounded, *rounded),
        unit,
    )


@cache
def _table8() -> tuple[Tensor, Tensor]:
    table = dynamic_codebook().contiguous()
    return table, (table[:-1] + table[1:]) / 2
