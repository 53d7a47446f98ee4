"""What happens beside the steps: logging, evaluation on the way, stopping on a signal or in time."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback

from nybble.data import FlatBatch, Groups, PadBatch
from nybble.data.batches import NOTHING, Group
from nybble.hardware import PeakMemory
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer, StepEvent


class CountingBatch:
    """A collator that also counts tokens and knows the rows, so that no step has to ask the device for them.

    Batches are made ahead of their use; what is noted of them waits in order until their step ends.
    """

    def __init__(self, collate: FlatBatch | PadBatch) -> None:
        self._collate = collate
        self._waiting: deque[tuple[int, tuple[int, ...]]] = deque()

    def __call__(self, drawn: Sequence[tuple[int, Group]]) -> dict[str, Any]:
        """A batch of groups with their numbers, both noted."""
        groups = [group for _, group in drawn]
        tokens = sum(len(example["input_ids"]) for number, group in drawn if number >= 0 for example in group)
        self._waiting.append((tokens, tuple(number for number, _ in drawn if number >= 0)))
        return self._collate(groups)

    def take(self, n_batches: int) -> int:
        """Tokens of the next `n_batches` batches."""
        return sum(self._waiting.popleft()[0] for _ in range(min(n_batches, len(self._waiting))))

    def groups(self, n_batches: int) -> list[int]:
        """Numbers of the groups in them."""
        return [number for _, numbers in islice(self._waiting, n_batches) for number in numbers]

    def clear(self) -> None:
        """Forget batches that were made but never trained on (the end of an epoch)."""
        self._waiting.clear()


class Drawn(Sequence[tuple[int, Group]]):
    """Groups, each with its number; -1 stands for none, where the other processes have one more."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: Any) -> Any:
        return number, self.groups[number] if number >= 0 else NOTHING


class Logbook(TrainerCallback):
    """Writes events.jsonl and tells the observer."""

    def __init__(
        self,
        run: RunDirectory,
        observer: Observer,
        memory: PeakMemory,
        batches: CountingBatch,
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        self._run = run
        self._processes = processes
        self._observer = observer
        self._memory = memory
        self._batches = batches
        self.accumulation: Callable[[], int] = lambda: 1  # micro-batches of the step under way; the trainer knows
        self.peak_bytes = 0  # of this process
        self._own_tokens = 0  # that this process has trained on
        self.before: tuple[int, float] = (0, 0.0)  # tokens and seconds of the run that this one resumes
        self.seconds_to_first_step: float | None = None
        self._created = time.monotonic()
        self._started = time.monotonic()

    @property
    def tokens(self) -> int:
        """Those of all processes, which must ask together."""
        return self._processes.sum(self._own_tokens)

    @property
    def seconds(self) -> float:
        """Since the first step began."""
        return time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"tokens": self.before[0] + self.tokens, "seconds": self.before[1] + self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.before = (state["tokens"], state["seconds"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.monotonic()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batches.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._own_tokens += self._batches.take(self.accumulation())
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.monotonic() - self._created

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        peak = self._memory.peak_bytes()
        self.peak_bytes = max(self.peak_bytes, peak)
        event = StepEvent(
            step=state.global_step,
            total_steps=state.max_steps,
            loss=_number(logs.get("loss")),
            learning_rate=_number(logs.get("learning_rate")),
            grad_norm=_number(logs.get("grad_norm")),
            tokens=self.before[0] + self.tokens,
            seconds=self.before[1] + self.seconds,
            peak_bytes=max(self._processes.gather(peak)),
            eval_loss=_number(logs.get("eval_loss")),
        )
        self._memory.reset()
        self._run.append_event(event)
        self._observer.step(event)


class Checks(TrainerCallback):
    """Evaluates and answers sample prompts every `every` steps."""

    def __init__(self, every: int, check: Callable[[int], float]) -> None:
        self._every = every
        self._check = check
        self.log: Callable[[dict[str, float]], None] = lambda _logs: None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            due = control.should_log  # transformers takes any log for the one that was due
            self.log({"eval_loss": self._check(state.global_step)})
            control.should_log = due


class Stops(TrainerCallback):
    """SIGINT, SIGTERM and a limit of time let the micro-batch end and save; a second signal ends at once."""

    def __init__(
        self,
        deadline: float | None,
        seconds_to_save: Callable[[], float],
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        """`deadline`: by the monotonic clock, which no change of the date moves."""
        self.reason: str | None = None
        self._processes = processes
        self._deadline = deadline
        self._seconds_to_save = seconds_to_save
        self._longest = 0.0  # seconds between two looks at the clock
        self._looked = time.monotonic()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stops:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._former[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the host program owns the signals
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.reason is not None:
            self.__exit__()
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._looked = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look()
        if self.reason is not None and not self._processes.are_many:
            control.should_save = True
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Many processes end together, behind the step in which the first of them wants to."""
        self._look()
        if self._processes.any(self.reason is not None):
            self.reason = self.reason or "another process"
            control.should_save = True
            control.should_training_stop = True

    def _look(self) -> None:
        now = time.monotonic()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        if self._deadline is None or self.reason is not None:
            return
        # Another micro-batch, and two writes: the one that may be under way and the last.
        if now + self._longest + 2 * self._seconds_to_save() >= self._deadline:
            self.reason = "max_seconds"


def _number(value: Any) -> float | None:
    """JSON has no NaN: what is not finite is left out."""
    return float(value) if value is not None and math.isfinite(float(value)) else None
