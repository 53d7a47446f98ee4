"""Whether the training is still one: losses and gradients that are no numbers, gradients far out of line.

Each optimizer step is judged by its loss and the norm of its gradient before it is made. On a GPU under `bad_batch:
stop` the two are read one step later, so that the step need not wait for the device; no checkpoint is written of what
has not been judged. Under `skip` they are read at once: a bad step changes no weight and counts for no loss.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.recipe import TrainingSection
from nybble.run.processes import Processes
from nybble.training.callbacks import CountingBatch

_REMEMBERED = 100  # norms
_FEWEST = 20  # of them before one is called a spike
_LISTED = 16  # rows named in a message


@dataclass(frozen=True)
class BadStep:
    """An optimizer step that should not be made."""

    step: int
    rows: tuple[int, ...]  # of its batch, numbers from 1
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
    groups: Sequence[int]  # of its batch, by number
    figures: Tensor  # (2,) float32: loss, norm
    ready: torch.cuda.Event | None


class Health:
    """Judges the steps of one training."""

    def __init__(
        self,
        section: TrainingSection,
        batches: CountingBatch,
        rows_of: Callable[[int], Sequence[int]],
        note: Callable[[str], None],
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        """`rows_of`: the numbers of the rows in a group."""
        self._processes = processes
        self._skips = section.bad_batch == "skip"
        self._spike = section.grad_spike
        self._batches = batches
        self._rows_of = rows_of
        self._note = note
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._unread: deque[_Unread] = deque()
        self.bad: BadStep | None = None  # what the training stops for
        self.skipped = 0  # steps

    def judge(self, step: int, n_batches: int, loss: Tensor, norm: Any, scaled: bool) -> bool:
        """Look at a step about to be made; whether it must not be.

        Args:
            step: its number, from 1.
            n_batches: micro-batches in it.
            loss: their sum, the same in all processes.
            norm: of the gradient.
            scaled: gradients are scaled (float16), so that an infinite one is for the scaler to judge.
        """
        groups = self._batches.groups(n_batches)
        norm = torch.as_tensor(norm, dtype=torch.float32, device=loss.device)
        figures = torch.stack([loss.float(), torch.zeros_like(loss, dtype=torch.float32) if scaled else norm])
        ready = None
        # Many processes must see the same at the same step.
        if figures.is_cuda and not (self._skips or self._processes.are_many):
            figures = torch.empty(2, pin_memory=True).copy_(figures, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append(_Unread(step, groups, figures, ready))
        return self.read(wait=ready is None)

    def read(self, wait: bool = True) -> bool:
        """Judge what is there to be read; whether the latest step is bad. `wait`: until all of it is there."""
        is_bad = False
        while self._unread and self.bad is None:
            unread = self._unread[0]
            if unread.ready is not None:
                if not wait and not unread.ready.query():
                    break
                unread.ready.synchronize()
            self._unread.popleft()
            loss, norm = unread.figures.tolist()
            why = self._fault(loss, norm)
            is_bad = why is not None
            if why is not None:
                own = [row for group in unread.groups for row in self._rows_of(group)]
                rows = {row for part in self._processes.gather(own) for row in part}
                self._found(BadStep(unread.step, tuple(sorted(rows)), why))
        return is_bad

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not a number"
        if not math.isfinite(norm):
            return "the gradient is not a number"
        usual = statistics.median(self._norms) if len(self._norms) >= _FEWEST else math.inf
        if self._spike and norm > self._spike * usual > 0:
            return f"the gradient's norm is {norm:.3g}, {norm / usual:,.0f} times the usual"
        self._norms.append(norm)
        return None

    def _found(self, bad: BadStep) -> None:
        if self._skips:
            self.skipped += 1
            self._note(f"{bad.in_words}: the batch is skipped")
        else:
            self.bad = bad

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"norms": list(self._norms), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._norms = deque(state["norms"], maxlen=_REMEMBERED)
        self.skipped = state["skipped"]
