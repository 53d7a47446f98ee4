"""Stopping a training early: on SIGINT, SIGTERM and SIGHUP, and before its time is up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from nybble.run.processes import Processes
from nybble.run.signals import HANG_UP, handle_stop_signals, ignore_further_hang_ups


class Stops:
    """Lets the micro-batch under way end, so that the state is saved; a second signal ends the process at once.

    SIGHUP is never that second signal, and is ignored after the first: see `ignore_further_hang_ups`.
    """

    def __init__(
        self,
        deadline: float | None,
        seconds_to_save: Callable[[], float],
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        """`deadline`: by the monotonic clock, which no change of the date moves."""
        self.reason: str | None = None  # why the training stops
        self._processes = processes
        self._deadline = deadline
        self._seconds_to_save = seconds_to_save
        self._longest = 0.0  # seconds between two looks at the clock
        self._looked = time.monotonic()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stops:
        self._looked = time.monotonic()
        self._former = handle_stop_signals(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def within_step(self) -> bool:
        """Whether to stop between two micro-batches; several processes stop between steps only."""
        self._look()
        return self.reason is not None and not self._processes.are_many

    def after_step(self) -> bool:
        """Whether to stop between two steps; several processes stop together as soon as one of them wants to."""
        self._look()
        if self._processes.any(self.reason is not None):
            self.reason = self.reason or "another process"
        return self.reason is not None

    def _handle(self, number: int, _frame: object) -> None:
        if number == HANG_UP:
            ignore_further_hang_ups()
            self._former.pop(HANG_UP, None)
        elif self.reason is not None:
            self.__exit__()
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def _look(self) -> None:
        now = time.monotonic()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        if self._deadline is None or self.reason is not None:
            return
        # Another micro-batch, and two writes: the one that may be under way and the last.
        if now + self._longest + 2 * self._seconds_to_save() >= self._deadline:
            self.reason = "max_seconds"
