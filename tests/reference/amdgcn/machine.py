"""AMD machine code, executed: an interpreter of the assembly text that Triton's compiler leaves, for tests.

It knows the instructions that our decoder is made of, on wave32 and wave64, and refuses any other. A workgroup's waves
run one after another, each to the next barrier; a wave's lanes are one NumPy array. Memory is the arrays it is given,
at addresses of its own: an access beside them is an error, so that nothing is read past an end unseen. It proves index
arithmetic, masks, layouts and rounding of the code as compiled. It cannot prove what depends on time: races, waits,
caches, hazards.

Reference: AMD's instruction set manuals (MI200, RDNA3, RDNA4), chapters on VALU, SALU, LDS and memory instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amdgcn.operations import (
    F32,
    I32,
    MASK,
    SALU,
    SCALARS,
    U32,
    VALU,
    Instruction,
    bits_of,
    literal,
    looked_up,
    mixed_product,
    number_of,
    pair_of,
    read,
    register,
)

_Bytes = Callable[[int, int], np.ndarray]
U64, I64 = np.uint64, np.int64
_NOTHING = re.compile(r"s_(waitcnt\w*|wait_\w+|nop|delay_alu|clause|barrier_signal|setprio)|buffer_gl\d_inv|global_inv")
_SIZES = {"ubyte": 1, "u8": 1, "short": 2, "b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8}
_SIZES |= {"dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16, "dwordx8": 32, "b256": 32}


class Memory:
    """Arrays at addresses, 4 GiB apart."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [array.reshape(-1).view(np.uint8) for array in arrays]

    @staticmethod
    def address(number: int) -> int:
        """Where array `number` begins."""
        return (number + 1) << 32

    def at(self, address: int, size: int) -> np.ndarray:
        """`size` bytes, as they lie in their array."""
        number, offset = (address >> 32) - 1, address & MASK
        if not (0 <= number < len(self._arrays) and offset + size <= len(self._arrays[number])):
            raise IndexError(f"{size} bytes at {address:#x} are in no array")
        return self._arrays[number][offset : offset + size]


@dataclass
class Wave:
    """Registers of one wave."""

    lanes: int
    s: list[int] = field(default_factory=lambda: [0] * 128)
    scc: bool = False

    def __post_init__(self) -> None:
        self.v = np.zeros((256, self.lanes), U32)
        self.s[126], self.s[127] = MASK, MASK if self.lanes == 64 else 0

    @property
    def active(self) -> np.ndarray:
        """Lanes that execute."""
        return bits_of(self.pair(126), self.lanes)

    def pair(self, number: int) -> int:
        """Two scalar registers as one number."""
        return self.s[number] | self.s[number + 1] << 32


class Kernel:
    """A kernel's text, read once."""

    def __init__(self, text: str, lanes: int) -> None:
        self.lanes = lanes
        self.code, self.labels = read(text)
        told = dict(re.findall(r"\.amdhsa_(\w+) (\d+)", text))
        self.n_user = int(told["user_sgpr_count"])
        kinds = ("private_segment_buffer", "dispatch_ptr", "queue_ptr")
        widths = zip(kinds, (4, 2, 2), strict=True)
        self.arguments_at = sum(width for kind, width in widths if told.get(f"user_sgpr_{kind}") == "1")
        self.layout = [
            (int(offset), int(size), kind)
            for offset, size, kind in re.findall(
                r"\.offset:\s+(\d+)\n\s+\.size:\s+(\d+)\n\s+\.value_kind:\s+(\w+)", text
            )
        ]
        self.argument_bytes = int(told["kernarg_size"])

    def run(self, arguments: Sequence[np.ndarray | int], groups: int, threads: int, lds_bytes: int) -> None:
        """Execute `groups` workgroups; arrays are pointers and are written in place.

        Raises:
            NotImplementedError: an instruction that is not known.
            IndexError: an access beside the arrays.
        """
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        block = np.zeros(self.argument_bytes, np.uint8)
        memory, pointers, values = Memory([*arrays, block]), iter(range(len(arrays))), iter(arguments)
        for offset, size, kind in self.layout:
            value: Any = 0
            if kind in ("global_buffer", "by_value"):
                value = next(values, 0)
            if kind == "hidden_block_count_x":
                value = groups
            if isinstance(value, np.ndarray):
                value = memory.address(next(pointers))
            block[offset : offset + size] = np.frombuffer(int(value).to_bytes(size, "little"), np.uint8)
        for group in range(groups):
            lds = np.zeros(lds_bytes, np.uint8)
            firsts = range(0, threads, self.lanes)
            waves = [self._wave(first, group, memory.address(len(arrays))) for first in firsts]
            running = [_Run(self, wave, memory, lds).steps() for wave in waves]
            while running:  # each to its next barrier
                running = [steps for steps in running if next(steps, None) is not None]

    def _wave(self, first: int, group: int, arguments: int) -> Wave:
        wave = Wave(self.lanes)
        wave.v[0] = np.arange(first, first + self.lanes, dtype=U32)
        wave.s[self.arguments_at], wave.s[self.arguments_at + 1] = arguments & MASK, arguments >> 32
        wave.s[self.n_user] = wave.s[SCALARS["ttmp9"]] = group
        wave.s[SCALARS["ttmp8"]] = first // self.lanes << 25  # of gfx12: the wave's number in its group
        return wave


class _Run:
    """One wave on its way through the code."""

    def __init__(self, kernel: Kernel, wave: Wave, memory: Memory, lds: np.ndarray) -> None:
        self.kernel, self.w, self.memory, self.lds = kernel, wave, memory, lds

    def steps(self) -> Iterator[str]:
        """Execute to the end; stops at each barrier."""
        place, code = 0, self.kernel.code
        while True:
            several, place = code[place], place + 1
            name = several[0].name
            if name == "s_endpgm":
                return
            if name in ("s_barrier", "s_barrier_wait"):
                yield name
            elif name == "s_branch" or (
                (branch := re.fullmatch(r"s_cbranch_scc([01])", name)) and (self.w.scc == (branch[1] == "1"))
            ):
                place = self.kernel.labels[several[0].operands[0]]
            elif not name.startswith("s_cbranch_scc") and not _NOTHING.fullmatch(name):
                # Two that issue together read before either writes.
                for write in [self._execute(one) for one in several]:
                    write()

    def _execute(self, one: Instruction) -> Callable[[], None]:
        name = re.sub(r"_(e32|e64|sdwa)$", "", one.name).replace("v_dual_", "v_")
        if name in SALU:
            return self._scalar(name, one)
        if name in VALU:
            return self._vector(name, one)
        for pattern, execute in (
            (r"v_cmp_(\w+)_([iu])(32|64)", self._compare),
            (r"s_load_(\w+)", self._scalar_load),
            (r"(buffer|global)_(load|store)_(\w+)", self._global),
            (r"ds_(read|load|write|store)_(b32|b64|b128)", self._lds),
            (r"ds_(?:read2(st64)?|load_2addr(_stride64)?)_b32", self._lds_two),
            (r"v_cndmask_b32|v_readfirstlane_b32|v_pk_mul_f32|v_mov_b16|v_mov_b64|v_bitop3_b32", self._others),
            (r"v_fma_mix(lo|hi)_f16", self._mixed),
        ):
            found = re.fullmatch(pattern, name)
            if found:
                return execute(one, found)
        raise NotImplementedError(one.name)

    def _value(self, text: str, wide: bool = False) -> int:
        """A scalar operand."""
        number = register(text, "s")
        if number is None:
            return literal(text) & (MASK << 32 | MASK if wide else MASK)
        return self.w.pair(number) if wide else self.w.s[number]

    def _lanes(self, text: str) -> np.ndarray:
        """A vector operand, a scalar in every lane."""
        number = register(text, "v")
        if number is None:
            return np.full(self.w.lanes, self._value(text), U32)
        value = self.w.v[number].copy()
        return {"l": value & U32(0xFFFF), "h": value >> U32(16)}.get(text[-1], value)

    def _put(self, number: int, value: np.ndarray) -> Callable[[], None]:
        active = self.w.active

        def write() -> None:
            self.w.v[number][active] = value[active]

        return write

    def _scalar(self, name: str, one: Instruction) -> Callable[[], None]:
        wide = name.endswith("64")
        compares = name.startswith("s_cmp")
        sources = one.operands if compares else one.operands[1:]
        # A shift of 64 bits takes its distance from one register.
        wides = [wide and not (i and "sh" in name) for i in range(len(sources))]
        value, scc = SALU[name](*(self._value(t, w) for t, w in zip(sources, wides, strict=True)), self.w.scc)

        def write() -> None:
            self.w.scc = self.w.scc if scc is None else scc
            if not compares:
                self._put_scalar(one.operands[0], value, wide)

        return write

    def _put_scalar(self, target: str, value: int, wide: bool) -> None:
        number = register(target, "s")
        assert number is not None
        self.w.s[number] = value & MASK
        if wide:
            self.w.s[number + 1] = value >> 32 & MASK

    def _vector(self, name: str, one: Instruction) -> Callable[[], None]:
        sources = [self._lanes(text) for text in one.operands[1:]]
        for i, source in enumerate(sources):
            selected = one.flags.get(f"src{i}_sel", "DWORD")
            if selected != "DWORD":
                kind, place = selected.split("_")
                width = 8 if kind == "BYTE" else 16
                sources[i] = source >> U32(width * int(place)) & U32((1 << width) - 1)
        target = register(one.operands[0], "v")
        assert target is not None
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return self._put(target, VALU[name](*sources))

    def _compare(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        how, sign, width = found.groups()
        left, right = (self._wide(t) if width == "64" else self._lanes(t) for t in one.operands[1:])
        kind: Any = {"i32": I32, "u32": U32, "i64": I64, "u64": U64}[sign + width]
        compare = {"lt": np.less, "gt": np.greater, "eq": np.equal, "le": np.less_equal, "ge": np.greater_equal}[how]
        mask = number_of(compare(left.view(kind), right.view(kind)) & self.w.active)
        return lambda: self._put_scalar(one.operands[0], mask, self.w.lanes == 64)

    def _wide(self, text: str) -> np.ndarray:
        number = register(text, "v")
        if number is None:
            value = self._value(text, True)
            return np.full(self.w.lanes, value, U64)
        return self.w.v[number].astype(U64) | self.w.v[number + 1].astype(U64) << U64(32)

    def _others(self, one: Instruction, _found: re.Match[str]) -> Callable[[], None]:
        name, target = re.sub("_e(32|64)$", "", one.name).replace("v_dual_", "v_"), one.operands[0]
        if name == "v_readfirstlane_b32":
            first = int(np.argmax(self.w.active))
            value = int(self._lanes(one.operands[1])[first])
            return lambda: self._put_scalar(target, value, False)
        number = register(target, "v")
        assert number is not None
        if name == "v_mov_b64":
            value64 = self._wide(one.operands[1])
            return self._both(number, (value64 & U64(MASK)).astype(U32), (value64 >> U64(32)).astype(U32))
        if name == "v_bitop3_b32":
            a, b, c = (self._lanes(text) for text in one.operands[1:])
            return self._put(number, looked_up(a, b, c, int(one.flags["bitop3"], 0)))
        if name == "v_mov_b16":
            value16 = self._lanes(one.operands[1]) & U32(0xFFFF)
            return lambda: self._halves(number, value16, target)
        if name == "v_cndmask_b32":
            mask = one.operands[3] if len(one.operands) > 3 else "vcc"
            chosen = bits_of(self._value(mask, True), self.w.lanes)
            return self._put(number, np.where(chosen, self._lanes(one.operands[2]), self._lanes(one.operands[1])))
        selected = [pair_of(one.flags.get("op_sel", "[0,0]")), pair_of(one.flags.get("op_sel_hi", "[1,1]"))]
        products = []
        for half in (0, 1):
            a, b = (self._half(one.operands[1 + i], selected[half][i]) for i in (0, 1))
            products.append((a.view(F32) * b.view(F32)).view(U32))
        return self._both(number, *products)

    def _both(self, number: int, low: np.ndarray, high: np.ndarray) -> Callable[[], None]:
        writes = self._put(number, low), self._put(number + 1, high)

        def write() -> None:
            for put in writes:
                put()

        return write

    def _mixed(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        target, left, right, plus = one.operands
        number = register(target, "v")
        if plus != "neg(0)" or one.flags or number is None:
            raise NotImplementedError(f"{one.name} of 16-bit sources or a sum")
        value = mixed_product(self._lanes(left), self._lanes(right))
        return lambda: self._halves(number, value, found[1])

    def _half(self, text: str, high: int) -> np.ndarray:
        kind = text[0]
        number = register(text, kind)
        assert number is not None
        return self._lanes(f"{kind}{number + high}")

    def _halves(self, number: int, value: np.ndarray, target: str) -> None:
        kept = self.w.v[number]  # as it is now: the other half may have been written together with this one
        joined = (
            kept & U32(0xFFFF) | value << U32(16) if target.endswith(("h", "hi")) else kept & U32(0xFFFF0000) | value
        )
        self._put(number, joined)()

    def _scalar_load(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        first = register(one.operands[0], "s")
        assert first is not None
        address = self._value(one.operands[1], True) + literal(one.operands[2])
        words = self.memory.at(address, _SIZES[found[1]]).view(U32)
        for i, word in enumerate(words):
            self.w.s[first + i] = int(word)
        return lambda: None

    def _global(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        place, way, size = found[1], found[2], _SIZES[found[3]]
        offset = int(one.flags.get("offset", "0"))
        if place == "buffer":
            target, at, descriptor, plus = one.operands
            number = register(descriptor, "s")
            assert number is not None
            base = self.w.s[number] | (self.w.s[number + 1] & 0xFFFF) << 32
            start = self._lanes(at) if "offen" in one.flags else np.zeros(self.w.lanes, U32)
            within = start.astype(I64) + offset + self._value(plus)
            seen = self.w.active & (within + size <= self.w.s[number + 2])
        else:
            target, at, start = one.operands if way == "load" else (one.operands[1], one.operands[0], one.operands[2])
            base = 0 if start == "off" else self._value(start, True)
            within = (self._wide(at).view(I64) if start == "off" else self._lanes(at).astype(I64)) + offset
            seen = self.w.active
        return self._move(target, way, size, [base + int(x) for x in within], seen, self.memory.at)

    def _lds(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        reads, size = found[1] in ("read", "load"), _SIZES[found[2]]
        target, at = one.operands if reads else one.operands[::-1]
        places = [int(x) + int(one.flags.get("offset", "0")) for x in self._lanes(at)]
        way = "load" if reads else "store"
        return self._move(target, way, size, places, self.w.active, self._in_lds)

    def _in_lds(self, place: int, size: int) -> np.ndarray:
        if place + size > len(self.lds):
            raise IndexError(f"{size} bytes at {place} lie outside of {len(self.lds)} bytes of LDS")
        return self.lds[place : place + size]

    def _lds_two(self, one: Instruction, found: re.Match[str]) -> Callable[[], None]:
        number, step = register(one.operands[0], "v"), 256 if found[1] or found[2] else 4
        assert number is not None
        starts = self._lanes(one.operands[1])
        for i in (0, 1):
            places = [int(x) + step * int(one.flags.get(f"offset{i}", "0")) for x in starts]
            self._move(f"v{number + i}", "load", 4, places, self.w.active, self._in_lds)
        return lambda: None

    def _move(
        self,
        target: str,
        way: str,
        size: int,
        places: list[int],
        seen: np.ndarray,
        at: Callable[[int, int], np.ndarray],
    ) -> Callable[[], None]:
        """Between registers and memory, lane by lane; what a descriptor does not cover reads as zero."""
        number = register(target, "v")
        assert number is not None
        words = self.w.v[number : number + max(1, size // 4)]
        for lane in np.flatnonzero(self.w.active):
            held = words[:, lane].copy()
            if way == "store":
                if seen[lane]:
                    at(places[lane], size)[:] = held.view(np.uint8)[:size]
                continue
            held[:] = 0
            if seen[lane]:
                held.view(np.uint8)[:size] = at(places[lane], size)
            words[:, lane] = held
        return lambda: None
