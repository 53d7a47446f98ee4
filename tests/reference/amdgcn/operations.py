"""What the instructions compute, and how their text is read. Every other instruction is refused."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

U32, I32, F32 = np.uint32, np.int32, np.float32
MASK = 0xFFFFFFFF
SCALARS = {"vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "ttmp8": 116, "ttmp9": 117, "m0": 124, "exec": 126, "exec_lo": 126}


@dataclass(frozen=True)
class Instruction:
    """One operation of a line."""

    name: str
    operands: tuple[str, ...]
    flags: Mapping[str, str]


def read(text: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    """Lines of operations (two where they issue together), and at which line each label stands."""
    code: list[list[Instruction]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition(";")[0].rstrip()
        if label := re.fullmatch(r"(\.?\w+):", line):
            labels[label[1]] = len(code)
        elif re.match(r"\s+[a-z]\w*_\w+", line):
            code.append([_instruction(part.strip()) for part in line.split("::")])
    return code, labels


def _instruction(text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    operands = [part.strip() for part in re.split(r",(?![^\[]*\])", rest)] if rest else []
    flags = {}
    if operands and not name.startswith("s_"):
        operands[-1], *more = operands[-1].split()
        flags = {flag.partition(":")[0]: flag.partition(":")[2] for flag in more}
    return Instruction(name, tuple(operands), flags)


def register(text: str, kind: str) -> int | None:
    """Number of the first register that an operand names; None if it names none of this kind ("v" or "s")."""
    if kind == "s" and text in SCALARS:
        return SCALARS[text]
    found = re.fullmatch(kind + r"\[?(\d+)(?::\d+)?\]?(?:\.[lh])?", text)
    return int(found[1]) if found else None


def literal(text: str) -> int:
    """A constant of the text; 1.0 and its like are float32. gfx12's register `null` reads as zero."""
    if text == "null":
        return 0
    return struct.unpack("<I", struct.pack("<f", float(text)))[0] if "." in text else int(text, 0)


def pair_of(text: str) -> tuple[int, int]:
    """`[1,0]`."""
    first, second = text.strip("[]").split(",")
    return int(first), int(second)


def bits_of(number: int, lanes: int) -> np.ndarray:
    """A mask of lanes."""
    return np.array([number >> lane & 1 for lane in range(lanes)], dtype=bool)


def number_of(bits: np.ndarray) -> int:
    """The mask as a number."""
    return sum(1 << int(lane) for lane in np.flatnonzero(bits))


def signed(value: int) -> int:
    """32 bits as a signed number."""
    return value - (1 << 32) if value & 0x80000000 else value


def _fits(value: int) -> tuple[int, bool]:
    return value & MASK, not -(1 << 31) <= value < 1 << 31


def _nonzero(value: int, mask: int = MASK) -> tuple[int, bool]:
    return value & mask, value & mask != 0


_M64 = MASK << 32 | MASK
# (sources, SCC) -> (result, SCC; None where it stays)
SALU: dict[str, Callable[..., tuple[int, bool | None]]] = {
    "s_mov_b32": lambda a, c: (a, None),
    "s_mov_b64": lambda a, c: (a, None),
    "s_movk_i32": lambda a, c: ((a ^ 0x8000) - 0x8000 & MASK if a < 0x10000 else a, None),
    "s_add_u32": lambda a, b, c: (a + b & MASK, a + b > MASK),
    "s_addc_u32": lambda a, b, c: (a + b + c & MASK, a + b + c > MASK),
    "s_add_i32": lambda a, b, c: _fits(signed(a) + signed(b)),
    "s_sub_u32": lambda a, b, c: (a - b & MASK, b > a),
    "s_subb_u32": lambda a, b, c: (a - b - c & MASK, b + c > a),
    "s_sub_i32": lambda a, b, c: _fits(signed(a) - signed(b)),
    "s_mul_i32": lambda a, b, c: (a * b & MASK, None),
    "s_and_b32": lambda a, b, c: _nonzero(a & b),
    "s_and_b64": lambda a, b, c: _nonzero(a & b, _M64),
    "s_or_b32": lambda a, b, c: _nonzero(a | b),
    "s_or_b64": lambda a, b, c: _nonzero(a | b, _M64),
    "s_xor_b32": lambda a, b, c: _nonzero(a ^ b),
    "s_andn2_b32": lambda a, b, c: _nonzero(a & ~b),
    "s_lshl_b32": lambda a, b, c: _nonzero(a << (b & 31)),
    "s_lshl_b64": lambda a, b, c: _nonzero(a << (b & 63), _M64),
    "s_lshr_b32": lambda a, b, c: _nonzero(a >> (b & 31)),
    "s_lshr_b64": lambda a, b, c: _nonzero(a >> (b & 63), _M64),
    "s_ashr_i32": lambda a, b, c: _nonzero(signed(a) >> (b & 31)),
    "s_bfe_u32": lambda a, b, c: _nonzero(a >> (b & 31) & (1 << (b >> 16 & 127)) - 1),
    "s_add_nc_u64": lambda a, b, c: (a + b & _M64, None),
    "s_sub_nc_u64": lambda a, b, c: (a - b & _M64, None),
    "s_cselect_b32": lambda a, b, c: (a if c else b, None),
    "s_cmp_eq_u32": lambda a, b, c: (0, a == b),
    "s_cmp_lg_u32": lambda a, b, c: (0, a != b),
    "s_cmp_lt_u32": lambda a, b, c: (0, a < b),
    "s_cmp_lt_i32": lambda a, b, c: (0, signed(a) < signed(b)),
    "s_cmp_gt_i32": lambda a, b, c: (0, signed(a) > signed(b)),
}
SALU["s_and_not1_b32"] = SALU["s_andn2_b32"]
SALU["s_add_co_u32"], SALU["s_add_co_ci_u32"] = SALU["s_add_u32"], SALU["s_addc_u32"]
SALU["s_sub_co_u32"], SALU["s_sub_co_ci_u32"] = SALU["s_sub_u32"], SALU["s_subb_u32"]
SALU["s_add_co_i32"], SALU["s_sub_co_i32"] = SALU["s_add_i32"], SALU["s_sub_i32"]


def _shift(x: np.ndarray) -> np.ndarray:
    return x & U32(31)


def _field(x: np.ndarray, start: np.ndarray, width: np.ndarray) -> np.ndarray:
    return x >> _shift(start) & ((U32(1) << _shift(width)) - U32(1))


def _floats(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A function of float32 on registers; NumPy rounds to nearest and keeps denormals, as the kernels are set to."""
    return lambda *x: function(*(part.view(F32) for part in x)).astype(F32).view(U32)


def _aligned(high: np.ndarray, low: np.ndarray, by: np.ndarray) -> np.ndarray:
    joined = high.astype(np.uint64) << np.uint64(32) | low
    return (joined >> _shift(by).astype(np.uint64)).astype(U32)


def _reversed(x: np.ndarray) -> np.ndarray:
    return np.array([int(f"{int(value):032b}"[::-1], 2) for value in x], U32)


def _permuted(high: np.ndarray, low: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the selector picks one of the 8 bytes; 12 is zero. Selectors of signs do not occur."""
    joined = high.astype(np.uint64) << np.uint64(32) | low
    result = np.zeros_like(low)
    for place in range(4):
        which = selector >> U32(8 * place) & U32(0xFF)
        if ((which > 7) & (which != 12)).any():
            raise NotImplementedError("v_perm_b32 with a sign")
        byte = joined >> (np.minimum(which, 7).astype(np.uint64) * np.uint64(8)) & np.uint64(0xFF)
        result |= np.where(which == 12, 0, byte).astype(U32) << U32(8 * place)
    return result


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit by bit, the bit of `table` at 4 a + 2 b + c."""
    result = np.zeros_like(a)
    for place in range(8):
        if table >> place & 1:
            bits = [x if place >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
            result |= bits[0] & bits[1] & bits[2]
    return result


def mixed_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """v_fma_mix of two float32 and -0: rounded to float32, then to float16, as the manual's formula has it."""
    return _half((a.view(F32) * b.view(F32)).view(U32))


def _half(x: np.ndarray) -> np.ndarray:
    return x.view(F32).astype(np.float16).view(np.uint16).astype(U32)


VALU: dict[str, Callable[..., np.ndarray]] = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": _reversed,
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_lshlrev_b32": lambda by, x: x << _shift(by),
    "v_lshrrev_b32": lambda by, x: x >> _shift(by),
    "v_ashrrev_i32": lambda by, x: (x.view(I32) >> _shift(by).view(I32)).view(U32),
    "v_lshl_add_u32": lambda x, by, c: (x << _shift(by)) + c,
    "v_lshl_or_b32": lambda x, by, c: x << _shift(by) | c,
    "v_add_lshl_u32": lambda a, b, by: (a + b) << _shift(by),
    "v_bfe_u32": _field,
    "v_alignbit_b32": _aligned,
    "v_perm_b32": _permuted,
    "v_add_f32": _floats(np.add),
    "v_sub_f32": _floats(np.subtract),
    "v_mul_f32": _floats(np.multiply),
    "v_cvt_f16_f32": _half,
    "v_cvt_f32_ubyte0": lambda a: (a & U32(0xFF)).astype(F32).view(U32),
    "v_cvt_pk_f16_f32": lambda a, b: _half(a) | _half(b) << U32(16),
    "v_mad_u32_u24": lambda a, b, c: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)) + c,
    "v_pack_b32_f16": lambda a, b: a & U32(0xFFFF) | b << U32(16),
}
VALU["v_add_nc_u32"], VALU["v_sub_nc_u32"] = VALU["v_add_u32"], VALU["v_sub_u32"]
