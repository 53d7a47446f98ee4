"""One run of an arm, in a process of its own, so that no arm inherits another's memory, caches or compiled code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.comparison.arms import Trial
from nybble.errors import NybbleError, StoppedError
from nybble.recipe import Recipe
from nybble.run.directory import RunDirectory, read_record
from nybble.run.record import Observer
from nybble.run.signals import HANG_UP, handle_stop_signals
from nybble.subprocesses import Child

_DOES_NOT_FIT = 3
_STOPPED = (4, 130)  # `nybble train` ended by a signal


@dataclass(frozen=True)
class TrialEnding:
    """How a trial ended."""

    code: int  # exit code of `nybble train`; negative: the signal that killed it
    error: str | None  # why it failed
    error_class: str = "NybbleError"
    predicted: dict[str, Any] | None = None  # the plan's figures, if the trial does not fit the device


def is_done(trial: Trial) -> bool:
    """Whether the run has finished, so that it need not be run again."""
    return (trial.run_dir / "run.json").is_file() and read_record(trial.run_dir)["status"] == "done"


def run_trial(trial: Trial, log: Path, watch: Observer) -> TrialEnding:
    """Train, or resume a training that was interrupted. What the process prints goes to `log` and to `watch`.

    Raises:
        StoppedError: a signal came. It was passed on, and the training saved what it has.
    """
    arguments = ["-m", "nybble", "train", str(trial.recipe_file)]
    if RunDirectory(trial.run_dir).last_checkpoint() is not None:
        arguments.append("--resume")
    elif (trial.run_dir / "run.json").is_file():
        arguments.append("--overwrite")
    # A new session: Ctrl+C in a terminal reaches only this process, which passes it on once.
    with Child(arguments, log=log, new_session=True) as child, _passing_on_signals(child):
        for line in child.lines():
            watch.note(line.strip())
        ended = child.wait()
    if ended.code in _STOPPED:
        raise StoppedError(f"stopped in {trial.run_dir.name} and saved; the same command again resumes there")
    if ended.code == 0:
        return TrialEnding(ended.code, None)
    predicted = predict(trial.recipe) if ended.code == _DOES_NOT_FIT else None
    return TrialEnding(ended.code, ended.reason, type(ended.error or NybbleError()).__name__, predicted)


def predict(recipe: Recipe) -> dict[str, Any] | None:
    """The plan's figures for a run that does not fit the device; None if it fits, and failed for another reason."""
    from nybble.planning import plan  # imports torch

    try:
        made = plan(recipe)
    except NybbleError:
        return None
    if made.fits:
        return None
    return {
        "predicted_bytes": made.peak_bytes,
        "device": made.device["name"],
        "trainable_parameters": made.trainable_parameters,
        "total_parameters": made.total_parameters,
    }


@contextmanager
def _passing_on_signals(child: Child) -> Iterator[None]:
    def pass_on(number: int, _frame: object) -> None:
        child.send_signal(number if number == HANG_UP else signal.SIGINT)

    former = handle_stop_signals(pass_on)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
