"""Tensors that wait on the host, for devices on which even full recomputation does not fit.

    layer inputs        copied to pinned host memory while the next layer computes, and fetched one layer ahead of the
                        backward pass (two are on the device at a time)
    embedding table     on the host; only the rows of a batch are copied to the device (exact)

What is learned does not change. On devices that share their memory with the host, this saves no memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nybble.nn.recompute import recomputed


class _State(threading.local):
    active = False


_state = _State()


def on_host() -> bool:
    """True while this thread allocates host memory; tensors without data do not show which device they stand for."""
    return _state.active


@contextmanager
def _host_side() -> Iterator[None]:
    before, _state.active = _state.active, True
    try:
        yield
    finally:
        _state.active = before


class HostStore:
    """The layer inputs of one micro-step in forward order; the backward pass reads them from the end."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []  # the layer inputs that wait on the host
        self._coming: dict[int, tuple[Tensor, Any]] = {}  # place -> input being copied, and the event of its arrival
        self._stream: Any = None  # the stream on which the copies run; None on a CPU

    def clear(self) -> None:
        """Drop the layer inputs that a failed pass has left behind."""
        self._kept.clear()
        self._coming.clear()

    def recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do as `nybble.nn.recompute.recomputed` does, but keep the arguments on the host."""
        with saved_tensors_hooks(self._put, self._get):
            return recomputed(function, *arguments)

    def _put(self, tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.ndim < 2:
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        with _host_side():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        if self._stream is None:
            host.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
        self._kept.append(host)
        return len(self._kept) - 1, tensor.device

    def _get(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        place, device = packed
        self._fetch(place, device)
        arrived, mark = self._coming.pop(place)
        if mark is not None:
            torch.cuda.current_stream(device).wait_event(mark)
            arrived.record_stream(torch.cuda.current_stream(device))
        if place:
            self._fetch(place - 1, device)
        del self._kept[place:]
        return arrived

    def _fetch(self, place: int, device: torch.device) -> None:
        if place in self._coming:
            return
        host = self._kept[place]
        if self._stream is None:
            self._coming[place] = host.to(device, copy=True), None
            return
        with torch.cuda.stream(self._stream):
            moved = host.to(device, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self._stream)
        self._coming[place] = moved, mark


class HostEmbedding:
    """The forward method of an embedding whose table stays on the host."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Move the table to the host, pinned if there is a GPU; the table stays there when the model is moved later."""
        device = embedding.weight.device
        table = embedding.weight.data.to("cpu")
        embedding.weight.data = table.pin_memory() if device.type == "cuda" else table
        embedding._apply = _stays.__get__(embedding)  # type: ignore[method-assign]

    def __call__(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        """The rows of `ids` on the device of `ids`. Reading the ids is the one wait for the device in a micro-step."""
        return nn.functional.embedding(ids.to("cpu"), embedding.weight).to(ids.device, non_blocking=True)


def _stays(module: nn.Module, _function: Callable[..., Any], _recurse: bool = True) -> nn.Module:
    """A replacement for `Module._apply`, by which a model moves between devices."""
    return module
