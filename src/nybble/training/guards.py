"""The non-finite guard: losses and gradients that are not numbers, and gradient norms far out of line.

Each optimizer step is judged by its loss and the norm of its gradient before the update. On a GPU under `bad_batch:
stop` the two are read one step later, so that the step does not wait for the device; no checkpoint is written of a step
that has not been judged. Under `skip` they are read at once, since a bad step must change no weight.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.recipe import TrainingSection
from nybble.run.processes import Processes

_FEWEST_NORMS = 20  # gradient norms that must be known before one is called a spike
_LISTED = 16  # rows that a message names at most


@dataclass(frozen=True)
class BadStep:
    """An optimizer step whose update should not happen."""

    step: int
    rows: tuple[int, ...]  # the numbers of the batch's rows, from 1
    why: str

    @property
    def in_words(self) -> str:
        """For people."""
        listed = ", ".join(str(row) for row in self.rows[:_LISTED])
        more = f" and {len(self.rows) - _LISTED} more" if len(self.rows) > _LISTED else ""
        return f"{self.why} at step {self.step} (rows {listed}{more})"


@dataclass(frozen=True)
class _Unread:
    step: int
    rows: Sequence[int]  # the rows of this process
    figures: Tensor  # (2,) float32: loss, norm
    ready: torch.cuda.Event | None


class NonFiniteGuard:
    """Judges the steps of one training."""

    def __init__(
        self,
        section: TrainingSection,
        gradient_norms: deque[float],
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        """`gradient_norms`: those of the latest good steps, which the guard appends to."""
        self._processes = processes
        self._is_read_at_once = section.bad_batch == "skip" or processes.are_many
        self._spike = section.grad_spike
        self._norms = gradient_norms
        self._unread: deque[_Unread] = deque()

    def judge(self, step: int, rows: Sequence[int], loss: Tensor, norm: Any, *, is_scaled: bool) -> BadStep | None:
        """Look at a step before its update; the bad one among those that could be read, if there is any.

        Args:
            step: its number, from 1.
            rows: those of its batch in this process.
            loss: of the step, the same in all processes.
            norm: of the gradient.
            is_scaled: gradients are scaled (float16), so that an infinite one is left to the scaler.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32, device=loss.device)
        figures = torch.stack([loss.float(), torch.zeros_like(norm) if is_scaled else norm])
        ready = None
        if figures.is_cuda and not self._is_read_at_once:
            figures = torch.empty(2, pin_memory=True).copy_(figures, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append(_Unread(step, rows, figures, ready))
        return self.read(wait=ready is None)

    def read(self, *, wait: bool = True) -> BadStep | None:
        """The first bad step among those that were not read yet; `wait`: until the device has computed all of them."""
        while self._unread:
            unread = self._unread[0]
            if unread.ready is not None:
                if not wait and not unread.ready.query():
                    return None
                unread.ready.synchronize()
            self._unread.popleft()
            loss, norm = unread.figures.tolist()
            why = self._fault(loss, norm)
            if why is not None:
                rows = {row for part in self._processes.gather(list(unread.rows)) for row in part}
                return BadStep(unread.step, tuple(sorted(rows)), why)
        return None

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not a number"
        if not math.isfinite(norm):
            return "the gradient is not a number"
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST_NORMS else math.inf
        if self._spike and norm > self._spike * usual > 0:
            return f"the gradient's norm is {norm:.3g}, {norm / usual:,.0f} times the usual"
        self._norms.append(norm)
        return None
