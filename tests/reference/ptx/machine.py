"""PTX, executed: an interpreter of the text that Triton's compiler leaves for NVIDIA, for tests.

A block's threads run in step, each register one NumPy array; or, `by_warp`, one warp after another, each as far as the
next barrier, in the order asked for. Memory is tensors of this process at their own addresses, and shared memory: an
access beside them, or one that is not aligned, is an error. So is a race: bytes that two warps touch between two
barriers, if one of them writes another value. That finds a missing barrier in any order of the warps. It proves index
arithmetic, masks, layouts, rounding and barriers of the code as compiled. It cannot prove what ptxas makes of it, nor
what depends on time or on the hardware's approximations (ex2, lg2, rcp, rsqrt and tanh are exact here).

Every instruction that is not known is refused. Reference: NVIDIA's PTX ISA manual.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ptx.arithmetic import BITS, TYPES, Array, computed, size_of, source_kinds
from ptx.program import Instruction, read

WARP = 32
MOST_STEPS = 3_000_000  # of one block: more is taken for an endless loop
NOBODY, SEVERAL = -1, -2
NOTHING = ("fence", "nanosleep", "prefetch", "griddepcontrol", "membar")


class RaceError(Exception):
    """Two warps touch the same bytes without a barrier in between, and one of them writes."""


class Region:
    """Bytes at an address, and which warp has read and written each of them since the last barrier."""

    def __init__(self, start: int, held: Array, name: str) -> None:
        self.start, self.held, self.name = start, held, name
        self.end = start + len(held)
        self._readers = np.full(len(held), NOBODY, np.int16)
        self._writers = np.full(len(held), NOBODY, np.int16)
        self._touched = False

    def load(self, at: Array, warps: Array) -> Array:
        """The bytes at the places `at`, `(threads, bytes)`."""
        self._touched = True
        others = self._writers[at]
        if ((others != NOBODY) & (others != warps[:, None])).any():
            raise RaceError(f"{self.name}: one warp reads what another wrote, without a barrier in between")
        before = self._readers[at]
        self._readers[at] = np.where((before == NOBODY) | (before == warps[:, None]), warps[:, None], SEVERAL)
        # Warps that read the same byte in this very instruction: one of them was kept above.
        self._readers[at[self._readers[at] != warps[:, None]]] = SEVERAL
        return self.held[at]

    def store(self, at: Array, values: Array, warps: Array) -> None:
        """Write `(threads, bytes)`."""
        self._touched = True
        for others in (self._readers[at], self._writers[at]):
            races = (others != NOBODY) & (others != warps[:, None]) & (self.held[at] != values)
            if races.any():
                raise RaceError(f"{self.name}: one warp writes what another touched, without a barrier in between")
        self.held[at] = values
        if (self.held[at] != values).any():
            raise RaceError(f"{self.name}: threads write different values to one byte at a time")
        self._writers[at] = warps[:, None]

    def barrier(self) -> None:
        """Forget who touched what."""
        if self._touched:
            self._readers.fill(NOBODY)
            self._writers.fill(NOBODY)
            self._touched = False


class Memory:
    """Ranges of this process's memory that a kernel may touch."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Each range is an address and a number of bytes."""
        self.regions = [
            Region(start, np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(start)), f"argument {i}")
            for i, (start, n) in enumerate(ranges)
            if n
        ]

    def at(self, low: int, high: int) -> Region:
        """The region that holds bytes `low` to `high`."""
        for region in self.regions:
            if region.start <= low and high <= region.end:
                return region
        raise IndexError(f"bytes {low:#x} to {high:#x} are in no tensor")


class Kernel:
    """A kernel's text, read once."""

    def __init__(self, text: str, threads: int, shared_bytes: int) -> None:
        self.program = read(text)
        self.threads, self.shared_bytes = threads, shared_bytes
        self.counts: Counter[int] = Counter()  # how often each instruction was executed
        self.reads = [source_kinds(one.parts) for one in self.program.code]
        self.literals: dict[tuple[str, str, int], Array] = {}  # by text, type and number of threads

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        memory: Memory,
        by_warp: bool = False,
        backwards: bool = False,
    ) -> None:
        """Execute a grid of blocks, one after another.

        Raises:
            NotImplementedError: an instruction that is not known.
            IndexError: an access beside the tensors.
            RaceError: a barrier is missing.
        """
        width = WARP if by_warp else self.threads
        with np.errstate(all="ignore"):  # integers wrap around, and infinities and NaN are numbers like others
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        self._block((x, y, z), grid, arguments, memory, width, backwards)

    def _block(
        self,
        place: tuple[int, int, int],
        grid: Sequence[int],
        arguments: Sequence[int | float],
        memory: Memory,
        width: int,
        backwards: bool,
    ) -> None:
        shared = Region(0, np.zeros(self.shared_bytes, np.uint8), "shared memory")
        parameters = {
            name: arguments[i] if i < len(arguments) else 0 for i, (_, name) in enumerate(self.program.parameters)
        }
        groups = [
            Threads(self, range(first, first + width), place, grid, parameters, memory, shared)
            for first in range(0, self.threads, width)
        ]
        running = [group.steps() for group in (reversed(groups) if backwards else groups)]
        while running:  # each to its next barrier
            running = [steps for steps in running if next(steps, None) is not None]
            for region in (shared, *memory.regions):
                region.barrier()


class Threads:
    """Threads that run in step: a whole block or a warp of it. Registers hold bits; a predicate holds booleans."""

    def __init__(
        self,
        kernel: Kernel,
        numbers: range,
        place: tuple[int, int, int],
        grid: Sequence[int],
        parameters: dict[str, int | float],
        memory: Memory,
        shared: Region,
    ) -> None:
        self.kernel, self.parameters, self.memory, self.shared = kernel, parameters, memory, shared
        self.n = len(numbers)
        thread = np.arange(numbers.start, numbers.stop, dtype=np.uint32)
        self.warps = (thread // WARP).astype(np.int16)
        self.registers: dict[str, Array] = {"%tid.x": thread, "%laneid": thread % WARP, "%warpid": thread // WARP}
        values = {"%ntid.x": kernel.threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0, "global_smem": 0}
        for axis, index, size in zip("xyz", place, grid, strict=True):
            values |= {f"%ctaid.{axis}": index, f"%nctaid.{axis}": size}
        for name, value in values.items():
            self.registers[name] = np.full(self.n, value, np.uint32)
        self.next = 0

    def steps(self) -> Iterator[str]:
        """Execute to the end; stops at each barrier of the block."""
        program = self.kernel.program
        for _ in range(MOST_STEPS):
            if self.next == len(program.code):
                return
            one, kinds = program.code[self.next], self.kernel.reads[self.next]
            self.next += 1
            name = one.parts[0]
            self.kernel.counts[self.next - 1] += 1
            mask = self.value(one.predicate, "pred") if one.predicate else None
            if name in ("ret", "exit"):
                if mask is None or self.uniform(mask):
                    return
            elif name == "bra":
                if mask is None or self.uniform(mask):
                    self.next = program.labels[one.operands[0]]
            elif name in ("bar", "barrier"):
                if "warp" not in one.parts:
                    yield name
            elif name not in NOTHING:
                own = _OWN.get(name)
                if own is not None:
                    own(self, one, mask)
                else:
                    self._compute(one, kinds, mask)
        raise RuntimeError(f"a block has not ended after {MOST_STEPS} instructions")

    def uniform(self, mask: Array) -> bool:
        """Whether all threads take a branch; that some do is not implemented (Triton's kernels have none)."""
        if mask.all():
            return True
        if mask.any():
            raise NotImplementedError("threads that run in step part ways")
        return False

    def value(self, operand: str, kind: str) -> Array:
        """An operand as numbers of a type."""
        if kind == "pred":
            if operand.startswith("!"):
                return ~self.value(operand[1:], "pred")
            return np.full(self.n, operand != "0") if operand in ("0", "1", "-1") else self.registers[operand]
        held = self.registers.get(operand)
        if held is not None:
            size = size_of(kind)
            return (held if held.itemsize == size else held.astype(BITS[size])).view(TYPES[kind])
        key = (operand, kind, self.n)
        if key not in self.kernel.literals:
            self.kernel.literals[key] = _literal(*key)
        return self.kernel.literals[key]

    def put(self, name: str, value: Array, mask: Array | None) -> None:
        """Write a register where `mask` is true; smaller numbers are widened with their sign."""
        if name == "_":
            return
        kind = self.kernel.program.register_kind(name)
        if kind != "pred":
            size = size_of(kind)
            value = np.ascontiguousarray(value)
            if value.itemsize != size:
                value = value.astype(f"i{size}") if value.dtype.kind == "i" else value.view(BITS[value.itemsize])
            value = value.view(BITS[size]) if value.itemsize == size else value.astype(BITS[size])
        if mask is not None:
            before = self.registers.get(name)
            value = np.where(mask, value, np.zeros_like(value) if before is None else before)
        self.registers[name] = value

    def _compute(self, one: Instruction, kinds: list[str], mask: Array | None) -> None:
        target, *operands = one.operands
        sources = [self.value(operand, kind) for operand, kind in zip(operands, kinds, strict=False)]
        result = computed(one.parts, sources)
        name, _, opposite = target.partition("|")
        self.put(name, result, mask)
        if opposite:
            self.put(opposite, ~result, mask)


def _literal(text: str, kind: str, n: int) -> Array:
    """A constant for each of `n` threads; 0f and 0d come before the bits of a float."""
    size, dtype = size_of(kind), TYPES[kind]
    if text[:2].lower() in ("0f", "0d"):
        bits = (np.uint32 if text[1] in "fF" else np.uint64)(int(text[2:], 16))
        return np.full(n, bits).astype(BITS[size]).view(dtype)
    return np.full(n, int(text.rstrip("U"), 0) & (1 << 8 * size) - 1, BITS[size]).view(dtype)


def _move(threads: Threads, one: Instruction, mask: Array | None) -> None:
    """mov: a register, or several that are parts of one."""
    (target, source), kind = one.operands, one.kind
    if target.startswith("{"):
        names = _names(target)
        part = size_of(kind) // len(names)
        pieces = np.ascontiguousarray(threads.value(source, kind)).view(BITS[part]).reshape(threads.n, len(names))
        for i, name in enumerate(names):
            threads.put(name, pieces[:, i], mask)
    elif source.startswith("{"):
        names = _names(source)
        part = size_of(kind) // len(names)
        pieces = np.stack([threads.value(name, f"b{8 * part}") for name in names], 1)
        threads.put(target, np.ascontiguousarray(pieces).view(BITS[part * len(names)])[:, 0], mask)
    else:
        threads.put(target, threads.value(source, kind), mask)


def _load(threads: Threads, one: Instruction, mask: Array | None) -> None:
    names, kind = _names(one.operands[0]), one.kind
    size = size_of(kind)
    if "param" in one.parts:
        value = threads.parameters[re.sub(r"[\[\]]|\+.*", "", one.operands[1])]
        if isinstance(value, float):
            value = int(np.float32(value).view(np.uint32))
        threads.put(names[0], np.full(threads.n, value & (1 << 8 * size) - 1, BITS[size]), mask)
        return
    live, at, region = _places(threads, one, one.operands[1], mask, size * len(names))
    found = np.zeros((threads.n, size * len(names)), np.uint8)
    if region is not None:
        found[live] = region.load(at, threads.warps[live])
    for i, name in enumerate(names):
        threads.put(name, np.ascontiguousarray(found[:, i * size : (i + 1) * size]).view(TYPES[kind])[:, 0], mask)


def _store(threads: Threads, one: Instruction, mask: Array | None) -> None:
    names, size = _names(one.operands[1]), size_of(one.kind)
    live, at, region = _places(threads, one, one.operands[0], mask, size * len(names))
    if region is not None:
        held = np.stack([threads.value(name, f"b{8 * size}") for name in names], 1)
        region.store(at, np.ascontiguousarray(held).view(np.uint8)[live], threads.warps[live])


def _places(
    threads: Threads, one: Instruction, operand: str, mask: Array | None, size: int
) -> tuple[Array, Array, Region | None]:
    """The threads that access memory, the places of their bytes in a region, and the region; None: nobody does."""
    address = _address(threads, operand)
    live = np.arange(threads.n) if mask is None else np.flatnonzero(mask)
    if not len(live):
        return live, live, None
    starts = address[live]
    if (starts % size).any():
        raise ValueError(f"{'.'.join(one.parts)}: {size} bytes at an address that is no multiple of {size}")
    if any(part.startswith("shared") for part in one.parts):
        return live, _inside(threads.shared, starts, size), threads.shared
    region = threads.memory.at(int(starts.min()), int(starts.max()) + size)
    return live, _inside(region, starts, size), region


def _inside(region: Region, starts: Array, size: int) -> Array:
    if starts.min() < region.start or starts.max() + size > region.end:
        raise IndexError(f"bytes {starts.min():#x} to {starts.max() + size:#x} lie outside of {region.name}")
    return (starts - region.start)[:, None] + np.arange(size)


def _address(threads: Threads, operand: str) -> Array:
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", operand)
    assert found is not None, operand
    wide = found[1].startswith("%") and threads.kernel.program.register_kind(found[1]).endswith("64")
    base = threads.value(found[1], "u64" if wide else "u32").astype(np.int64)
    return base + int(found[3] or 0) * (-1 if found[2] == "-" else 1)


def _shuffle(threads: Threads, one: Instruction, mask: Array | None) -> None:
    """shfl.sync: each lane takes the value of another of its warp."""
    mode, lane = one.parts[2], (np.arange(threads.n) % WARP).astype(np.int64)
    value = threads.value(one.operands[1], "b32")
    by, control = (threads.value(operand, "u32").astype(np.int64) for operand in one.operands[2:4])
    clamp, segment = control & 31, control >> 8 & 31
    last = lane & segment | clamp & ~segment & 31
    source = {"bfly": lane ^ by, "idx": lane & segment | by & ~segment & 31, "up": lane - by, "down": lane + by}[mode]
    valid = source >= last if mode == "up" else source <= last
    source = np.where(valid, source, lane) + np.arange(threads.n) // WARP * WARP
    name, _, was_valid = one.operands[0].partition("|")
    threads.put(name, value[source], mask)
    if was_valid:
        threads.put(was_valid, valid, mask)


def _matrix(threads: Threads, one: Instruction, mask: Array | None) -> None:
    """ldmatrix, stmatrix: 8 x 8 numbers of 16 bits; the addresses of the rows come from 8 lanes for each matrix."""
    if mask is not None and not mask.all():
        raise NotImplementedError("a masked move of matrices")
    loads, transposes = one.parts[0] == "ldmatrix", "trans" in one.parts
    names, where = one.operands if loads else one.operands[::-1]
    address, lane = _address(threads, where), np.arange(WARP)
    row, column = lane // 4, 2 * (lane % 4)
    for i, name in enumerate(_names(names)):
        result = np.zeros(threads.n, np.uint32)
        for first in range(0, threads.n, WARP):
            starts = address[first + 8 * i : first + 8 * i + 8]
            if (starts % 16).any():
                raise ValueError(f"{'.'.join(one.parts)}: a row at an address that is no multiple of 16")
            at, warps = _inside(threads.shared, starts, 16), threads.warps[first : first + 8]
            if loads:
                matrix = np.ascontiguousarray(threads.shared.load(at, warps)).view(np.uint16)
                matrix = matrix.T if transposes else matrix
                pair = matrix[row, column].astype(np.uint32), matrix[row, column + 1].astype(np.uint32)
                result[first : first + WARP] = pair[0] | pair[1] << np.uint32(16)
            else:
                held = threads.value(name, "b32")[first : first + WARP]
                matrix = np.zeros((8, 8), np.uint16)
                matrix[row, column] = held & np.uint32(0xFFFF)
                matrix[row, column + 1] = held >> np.uint32(16)
                matrix = np.ascontiguousarray(matrix.T if transposes else matrix)
                threads.shared.store(at, matrix.view(np.uint8), warps)
        if loads:
            threads.put(name, result, None)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


_OWN: dict[str, Callable[[Threads, Instruction, Array | None], None]] = {
    "mov": _move,
    "ld": _load,
    "st": _store,
    "shfl": _shuffle,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
}
