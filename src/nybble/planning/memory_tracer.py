"""A memory tracer: how many bytes of tensors are alive at each moment, and what they are.

A tensor's memory is its storage; a storage is counted from the operator that makes it until nothing refers to it. Real
tensors and fake ones (shapes without data) are counted alike, so one definition serves prediction and measurement.
What an operator of ours needs inside itself is not seen; on the fast paths that is nothing of size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from nybble.kernels import attention  # noqa: F401 - defines the operators that are counted
from nybble.kernels.attention.segments import segments_of
from nybble.kernels.linear_attention import ops  # noqa: F401 - defines the operators that are counted
from nybble.nn import stand_in
from nybble.nn.host_memory import on_host
from nybble.nn.workspace import workspace

HOST = "host"  # memory on the host is counted separately, outside the device's total
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "workspace")


@dataclass
class Peak:
    """The highest moment of a section of the step."""

    total_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)  # of PARTS, adding up to the total
    tensors: list[tuple[int, str]] = field(default_factory=list)  # bytes and origin, largest first; where asked for


@dataclass
class _Entry:
    reference: weakref.ref[torch.UntypedStorage]
    n_bytes: int
    part: str
    origin: str


def _attention_flops(share: float, q: Tensor, lengths: Sequence[int], others: Sequence[Any]) -> float:
    parents = others[3] if len(others) > 3 and others[3] else ()  # behind scale, window and softcap
    seen = sum(s.length * (s.length + 2 * s.offset) for s in segments_of(lengths, parents))
    return share * q.shape[1] * q.shape[2] * seen


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *others: Any, out_val: Any) -> float:
    """Two products of T x T, of each of which the causal half is computed."""
    return _attention_flops(2.0, q, lengths, others)


def _backward_flops(grad: Tensor, saved: Sequence[Tensor], lengths: Sequence[int], *others: Any, out_val: Any) -> float:
    """Five products of T x T, of each of which the causal half is computed."""
    return _attention_flops(5.0, grad, lengths, others)


def _recurrent_flops(share: float, k: Tensor, v: Tensor, delta: bool) -> float:
    """Products of a chunk of 64 tokens with the state, and, half as many, of its tokens with each other."""
    per_token = (3 if delta else 2) * k.shape[2] * v.shape[2] + 64 * (k.shape[2] + v.shape[2])
    return share * v.shape[0] * v.shape[1] * per_token


def _linear_attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any) -> float:
    return _recurrent_flops(2.0, k, v, rest[5])  # behind g, beta, lengths, parents and scale


def _linear_attention_backward_flops(grad: Tensor, inputs: Sequence[Tensor], *rest: Any, out_val: Any) -> float:
    """The forward again, and two products for each of its own."""
    return _recurrent_flops(6.0, inputs[1], inputs[2], rest[3])


def _matrix_flops(into: Tensor, a: Tensor, b: Tensor, *_: Any, out_val: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_FLOPS: dict[Any, Callable[..., float]] = {
    torch.ops.nybble.attend: _forward_flops,
    torch.ops.nybble.attend_backward: _backward_flops,
    torch.ops.nybble.linear_attention: _linear_attention_flops,
    torch.ops.nybble.linear_attention_backward: _linear_attention_backward_flops,
    torch.ops.aten.addmm_: _matrix_flops,
    torch.ops.aten.mm: lambda a, b, *_, out_val: 2 * a.shape[0] * a.shape[1] * b.shape[1],
}


# Operators that move nothing, and those that read no more of their input than they return.
_UNTOUCHED = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided)
_PICKING = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select)


def _result_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` returns; torch multiplies groups of any type, and without data it takes bfloat16 alone."""
    is_grouped = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
    if not is_grouped or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)


class MemoryTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are made while it is entered; `section` names the part of the step that comes next."""

    def __init__(self, rounding: int = 1, detailed: bool = False) -> None:
        """Each storage counts as a multiple of `rounding` bytes; `detailed` peaks list the largest tensors (slow)."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0  # of products and attention
        self.moved_bytes = 0  # read and written by everything else
        self.operators = 0  # that do work; views do none
        self._rounding = rounding
        self.peaks: dict[str, Peak] = {}
        self.total_bytes = 0
        self.making = "activations"  # part that a new storage belongs to
        self._section = ""
        self._detailed = detailed
        self._entries: dict[int, _Entry] = {}
        self._parts = dict.fromkeys((*PARTS, HOST), 0)
        self.host_peak_bytes = 0

    def start(self, section: str) -> None:
        """Forget peaks and work so far; what is alive stays counted."""
        self.peaks, self.flops, self.moved_bytes, self.operators = {}, 0, 0, 0
        self.host_peak_bytes = self._parts[HOST]
        self.section(section)

    def section(self, name: str) -> None:
        """Count what comes from now on in the section `name`."""
        self._section = name
        self._note()

    def adopt(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count `tensors` as `part`, whether or not they were counted before."""
        for tensor in tensors:
            self._count(tensor, part, part)

    def parts(self) -> dict[str, int]:
        """The bytes that are alive now, by part."""
        return self._split()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, new storages are counted in the part `name`."""
        before, self.making = self.making, name
        try:
            yield
        finally:
            self.making = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _result_of(func, args, kwargs or {})
        self._work(func, args, result)
        for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value, None, str(func))
        return result

    def _work(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        packet = func.overloadpacket
        formula = _FLOPS.get(packet) or flop_registry.get(packet)
        if getattr(func, "is_view", False) or func.namespace == "prim" or packet in _UNTOUCHED:
            return
        times = stand_in.times()
        self.operators += times
        if formula is not None:
            self.flops += times * int(formula(*args, out_val=result))
            return
        seen = (result, result) if packet in _PICKING else (args, result)
        moved = sum(t.numel() * t.element_size() for t in tree_iter(seen) if isinstance(t, Tensor))
        self.moved_bytes += times * moved

    def _count(self, tensor: Tensor, part: str | None, origin: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._entries.get(key)
        if found is not None:
            if part is not None and part != found.part:
                self._add(found.part, -found.n_bytes)
                found.part = part
                self._add(part, found.n_bytes)
            return
        n_bytes = -(-storage.nbytes() // self._rounding) * self._rounding
        if n_bytes == 0:
            return
        entry = _Entry(
            weakref.ref(storage, lambda _: self._forget(key)),
            n_bytes,
            part or (HOST if on_host() else self.making),
            f"{origin} {tuple(tensor.shape)} {tensor.dtype} in {self._section}" if self._detailed else "",
        )
        self._entries[key] = entry
        self._add(entry.part, n_bytes)
        self._note()

    def _add(self, part: str, n_bytes: int) -> None:
        self._parts[part] += n_bytes
        if part == HOST:
            self.host_peak_bytes = max(self.host_peak_bytes, self._parts[HOST])
        else:
            self.total_bytes += n_bytes

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._add(entry.part, -entry.n_bytes)

    def _note(self) -> None:
        peak = self.peaks.get(self._section)
        if peak is not None and peak.total_bytes >= self.total_bytes:
            return
        self.peaks[self._section] = Peak(self.total_bytes, self._split(), self._largest() if self._detailed else [])

    def _split(self) -> dict[str, int]:
        parts = {part: n for part, n in self._parts.items() if part != HOST}
        for piece in workspace.pieces():
            entry = self._entries.get(piece.untyped_storage()._cdata)
            if entry is not None and entry.part != "workspace":
                parts[entry.part] -= entry.n_bytes
                parts["workspace"] += entry.n_bytes
        return parts

    def _largest(self) -> list[tuple[int, str]]:
        found = [(e.n_bytes, f"{e.part}: {e.origin}") for e in self._entries.values() if e.part != HOST]
        return sorted(found, reverse=True)[:60]
