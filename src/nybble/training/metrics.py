"""The figures that a training reports while it runs: lines of events.jsonl, the observer and the trackers."""

from __future__ import annotations

import math
import time
from typing import Any

from nybble.hardware import PeakMemory
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Evaluation, Observer, StepEvent
from nybble.training.state import TrainState
from nybble.training.trackers import Trackers


class Metrics:
    """Logs the steps of one training; all processes log together, and the first one's run and trackers write."""

    def __init__(
        self,
        run: RunDirectory,
        observer: Observer,
        memory: PeakMemory,
        max_steps: int,
        trackers: Trackers,
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        self._run = run
        self._observer = observer
        self._memory = memory
        self._max_steps = max_steps
        self._trackers = trackers
        self._processes = processes
        self._created = time.monotonic()
        self._tracked = (0, 0.0)  # tokens and seconds at the last logged step
        self.peak_bytes = 0  # the highest memory of this process
        self.seconds_to_first_step: float | None = None

    def first_step_is_done(self) -> None:
        """Note how long it took."""
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.monotonic() - self._created

    def log_step(
        self, state: TrainState, loss: float, learning_rate: float, grad_norm: Any, figures: dict[str, float]
    ) -> None:
        """The means of loss and figures of the steps since the last log, and rate and gradient norm of this one."""
        norm = float(grad_norm)
        peak = self._log(state, figures, loss=loss, learning_rate=learning_rate, grad_norm=norm)
        epoch = state.step / state.loader.steps_an_epoch
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "epoch": epoch,
            "tokens_per_second": self._speed(state),
            "peak_memory_bytes": peak,
            **figures,
        }
        self._trackers.log({f"train/{name}": value for name, value in values.items()}, state.step)

    def log_evaluation(self, state: TrainState, measured: Evaluation) -> None:
        """The figures of the held-out rows after this step."""
        self._log(state, {}, eval_loss=measured.loss)
        self._trackers.log_evaluation(measured, state.step)

    def _speed(self, state: TrainState) -> float | None:
        """Tokens a second since the last logged step, or since the start."""
        tokens, seconds = self._tracked
        self._tracked = (state.tokens, state.seconds)
        return (state.tokens - tokens) / (state.seconds - seconds) if state.seconds > seconds else None

    def _log(self, state: TrainState, figures: dict[str, float], **values: float) -> int:
        """Write an event; the highest memory of any process since the last one, in bytes."""
        peak = self._memory.peak_bytes()
        self.peak_bytes = max(self.peak_bytes, peak)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        event = StepEvent(
            step=state.step,
            total_steps=self._max_steps,
            loss=finite.get("loss"),
            learning_rate=finite.get("learning_rate"),
            grad_norm=finite.get("grad_norm"),
            tokens=state.tokens,
            seconds=state.seconds,
            peak_bytes=max(self._processes.gather(peak)),
            eval_loss=finite.get("eval_loss"),
            figures={name: value for name, value in figures.items() if math.isfinite(value)} or None,
        )
        self._memory.reset()
        self._run.append_event(event)
        self._observer.step(event)
        return event.peak_bytes
