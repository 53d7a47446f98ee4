"""What PTX instructions compute, lane by lane, on NumPy arrays. Reference: NVIDIA's PTX ISA manual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {
    "s8": np.int8, "u8": np.uint8, "b8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.bool_,
}  # fmt: skip
BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
Parts = tuple[str, ...]


_SIZES = {kind: int(np.dtype(dtype).itemsize) for kind, dtype in TYPES.items()}


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return _SIZES[kind]


def source_kinds(parts: Parts) -> list[str]:
    """The types in which the sources of an instruction are read."""
    name, kind = parts[0], parts[-1]
    wide = _WIDER.get(kind, kind) if "wide" in parts else kind
    if name == "cvt":
        kinds = [part for part in parts if part in TYPES]
        return [kinds[1]] * (2 if kinds[0].endswith("x2") else 1)
    special = {
        "mad": [kind, kind, wide],
        "shl": [kind, "u32"],
        "shr": [kind, "u32"],
        "bfe": [kind, "u32", "u32"],
        "bfi": [kind, kind, "u32", "u32"],
        "selp": [kind, kind, "pred"],
        "setp": [kind, kind, "pred"],
    }
    return special.get(name, [kind] * 4)


def computed(parts: Parts, sources: list[Array]) -> Array:
    """The result of one instruction.

    Raises:
        NotImplementedError: an instruction that is not known.
    """
    name, kind = parts[0], parts[-1]
    if kind in ("f16x2", "bf16x2") and name != "cvt":
        if kind == "bf16x2":
            raise NotImplementedError(".".join(parts))
        halves = [np.ascontiguousarray(source).view(np.float16) for source in sources]
        return np.ascontiguousarray(computed((*parts[:-1], "f16"), halves)).view(np.uint32)
    if name in _PLAIN:
        result = _PLAIN[name](*sources)
    elif name in _WITH_PARTS:
        result = _WITH_PARTS[name](parts, *sources)
    else:
        raise NotImplementedError(".".join(parts))
    if "ftz" in parts and kind == "f32":  # subnormal results become zero
        result = np.where(np.abs(result) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), result), result)
    return result


def _in_float64(function: Callable[..., Array]) -> Callable[..., Array]:
    """Computed in float64 and rounded once: what the hardware approximates is compared within a tolerance."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """float64 holds the product of two float32 exactly; the sum rounds twice at worst."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _multiplied(parts: Parts, a: Array, b: Array) -> Array:
    kind = parts[-1]
    if "wide" in parts or "hi" in parts:
        wide = TYPES[_WIDER[kind]]
        product = a.astype(wide) * b.astype(wide)
        return product if "wide" in parts else (product >> wide(8 * size_of(kind))).astype(a.dtype)
    return a * b


def _divided(parts: Parts, a: Array, b: Array) -> Array:
    if parts[-1].startswith("f"):
        return a / b
    quotient = (
        np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b)) if a.itemsize < 8 else a // np.where(b == 0, 1, b)
    )
    return quotient.astype(a.dtype)


def _shifted_left(a: Array, distance: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(distance >= bits, 0, a << np.minimum(distance, bits - 1).astype(a.dtype)).astype(a.dtype)


def _shifted_right(a: Array, distance: Array) -> Array:
    """Of signed numbers the sign moves in."""
    bits = 8 * a.itemsize
    far = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else np.zeros_like(a)
    return np.where(distance >= bits, far, a >> np.minimum(distance, bits - 1).astype(a.dtype)).astype(a.dtype)


def _funnel(parts: Parts, low: Array, high: Array, distance: Array) -> Array:
    shift = distance.astype(np.uint64)
    shift = shift & np.uint64(31) if "wrap" in parts else np.minimum(shift, np.uint64(32))
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return ((both << shift) >> np.uint64(32) if "l" in parts else both >> shift).astype(np.uint32)


def _looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit by bit, the entry of an 8-bit table that the bits of a, b and c name."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _extracted(a: Array, start: Array, length: Array) -> Array:
    bits = 8 * a.itemsize
    unsigned = BITS[a.itemsize]
    moved = a.view(unsigned) >> np.minimum(start, bits - 1).astype(unsigned)
    above = np.maximum(bits - length.astype(np.int64), 0).astype(a.dtype)
    return np.where(length == 0, 0, (moved.view(a.dtype) << above) >> above).astype(a.dtype)


def _inserted(a: Array, into: Array, start: Array, length: Array) -> Array:
    at = start.astype(np.uint64)
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << at
    return (into.astype(np.uint64) & ~mask | (a.astype(np.uint64) << at) & mask).astype(a.dtype)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the 8 bytes of a and b, or its sign."""
    held = np.stack([a, b], 1).view(np.uint8).reshape(len(a), 8)
    result = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = held[np.arange(len(a)), chosen & np.uint32(7)]
        result[:, i] = np.where(chosen & np.uint32(8), np.where(byte & np.uint8(0x80), 255, 0), byte)
    return result.view(np.uint32)[:, 0]


def _compared(parts: Parts, a: Array, b: Array, *more: Array) -> Array:
    how = parts[1]
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), np.bool_)
    if how in ("num", "nan"):
        result = unordered if how == "nan" else ~unordered
    elif how in _COMPARISONS:
        result = _COMPARISONS[how](a, b) & ~unordered
    else:  # equ, neu, ltu, ..: also where one is no number
        result = _COMPARISONS[how[:-1]](a, b) | unordered
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return combine[parts[2]](result, more[0]) if more else result


def bfloat16_bits(x: Array) -> Array:
    """float32 rounded to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _converted(parts: Parts, *sources: Array) -> Array:
    to, source = [part for part in parts if part in TYPES][:2]
    if to in ("bf16", "bf16x2", "f16x2"):
        narrow = bfloat16_bits if to.startswith("bf") else lambda x: x.astype(np.float16).view(np.uint16)
        if to == "bf16":
            return narrow(sources[0])
        high, low = (narrow(x).astype(np.uint32) for x in sources)
        return high << np.uint32(16) | low
    value = sources[0]
    if source == "bf16":
        value = (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to.startswith("f") or value.dtype.kind != "f":
        return value.astype(TYPES[to])
    whole = next(_ROUNDINGS[part] for part in parts if part in _ROUNDINGS)(value.astype(np.float64))
    limits = np.iinfo(TYPES[to])
    return np.clip(np.nan_to_num(whole), limits.min, limits.max).astype(TYPES[to])


_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "fma": _fma,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": _shifted_left, "shr": _shifted_right, "lop3": _looked_up, "bfe": _extracted, "bfi": _inserted,
    "prmt": _permuted, "sqrt": np.sqrt,
    "rsqrt": _in_float64(lambda x: 1 / np.sqrt(x)), "rcp": _in_float64(lambda x: 1 / x),
    "ex2": _in_float64(np.exp2), "lg2": _in_float64(np.log2), "tanh": _in_float64(np.tanh),
    "selp": lambda a, b, chosen: np.where(chosen, a, b), "mov": lambda x: x, "cvta": lambda x: x,
}  # fmt: skip
_WITH_PARTS: dict[str, Callable[..., Array]] = {
    "mul": _multiplied,
    "mad": lambda parts, a, b, c: _multiplied(parts, a, b) + c,
    "div": _divided,
    "rem": lambda _, a, b: np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype),
    "min": lambda parts, a, b: (np.minimum if "NaN" in parts else np.fmin)(a, b),
    "max": lambda parts, a, b: (np.maximum if "NaN" in parts else np.fmax)(a, b),
    "shf": _funnel,
    "setp": _compared,
    "cvt": _converted,
}
