"""Memory that is reused: decoded weights, chunks of logits, rows after dropout.

There is one piece for each device and type, as large as the largest request so far. A fresh 32 MB buffer for each
product costs a CPU ten times the decoding, in page faults; on a GPU it costs the allocator's time and fragments.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """The pieces of one thread. The result of `take` is valid until the next `take` of its device and type."""

    # All threads share this setting: a backward pass on a GPU runs in a thread of its own.
    _keeps = True
    _round = 0

    def __init__(self) -> None:
        self.generation = 0  # number of `take` calls, which shows code that lends memory whether it was reused
        self._held: dict[tuple[torch.device, torch.dtype, type[Tensor]], Tensor] = {}
        self._held_in = Workspace._round

    def keep(self, wanted: bool) -> None:
        """Whether memory is held between uses; if not, each `take` allocates, and what is held is freed."""
        if not wanted and Workspace._keeps:
            Workspace._round += 1
            self._held.clear()
        Workspace._keeps = wanted

    def take(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous memory of `shape` and `dtype` on the device of `like`; its content is that of an earlier use."""
        self.generation += 1
        if self._held_in != Workspace._round:
            self._held.clear()
            self._held_in = Workspace._round
        if not Workspace._keeps:
            return torch.empty(shape, dtype=dtype, device=like.device)
        size = 1
        for extent in shape:
            size *= extent
        # Tensors without data (tracing) have a piece of their own.
        kind = Tensor if type(like) in (Tensor, torch.nn.Parameter) else type(like)
        held = self._held.get((like.device, dtype, kind))
        if held is None or held.numel() < size:
            self._held.pop((like.device, dtype, kind), None)  # frees the old piece before the new one is allocated
            held = None
            held = self._held[like.device, dtype, kind] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)

    def pieces(self) -> list[Tensor]:
        """The pieces that are held now."""
        return list(self._held.values())

    def clear(self) -> None:
        """Free all memory."""
        self._held.clear()


workspace = Workspace()
