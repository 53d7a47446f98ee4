"""Memory that is used again and again: decoded weights, chunks of logits, rows after dropout.

One piece for each device and type, as large as the largest need. A fresh 32 MB buffer for each product costs a CPU ten
times the decoding, in page faults; on a GPU it costs the allocator's time and fragments.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """The pieces of one thread. What `take` gives is good until the next `take` of its device and type."""

    # Of all threads: a backward pass on a GPU runs in one of its own.
    _keeps = True
    _round = 0

    def __init__(self) -> None:
        self.generation = 0  # how often `take` was called: whoever lends memory on can tell that it was taken again
        self._held: dict[tuple[torch.device, torch.dtype, type[Tensor]], Tensor] = {}
        self._held_in = Workspace._round

    def keep(self, wanted: bool) -> None:
        """Whether memory is held between uses; where it is not, each `take` is fresh, and what is held goes."""
        if not wanted and Workspace._keeps:
            Workspace._round += 1
            self._held.clear()
        Workspace._keeps = wanted

    def take(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous memory of `shape` and `dtype` on the device of `like`; its content is left over from before."""
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
            self._held.pop((like.device, dtype, kind), None)  # let the old piece go before the new one comes
            held = None
            held = self._held[like.device, dtype, kind] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)

    def pieces(self) -> list[Tensor]:
        """What is held now."""
        return list(self._held.values())

    def clear(self) -> None:
        """Let all memory go."""
        self._held.clear()


workspace = Workspace()
