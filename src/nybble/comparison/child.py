"""One run in a process of its own, so that no arm inherits another's memory, caches or compiled code."""

from __future__ import annotations

import signal
import subprocess
import sys
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

_DOES_NOT_FIT = 3
_STOPPED = (4, 130)  # `nybble train` ended by a signal


@dataclass(frozen=True)
class Ending:
    """How a run's process ended."""

    code: int
    error: str | None  # its last line, where it failed
    predicted: dict[str, Any] | None = None  # figures of an arm that does not fit the device


def is_done(trial: Trial) -> bool:
    """Whether the run is finished and need not be run again."""
    return (trial.run_dir / "run.json").is_file() and read_record(trial.run_dir)["status"] == "done"


def run_trial(trial: Trial, log: Path, watch: Observer) -> Ending:
    """Start the run, or go on with it where it was interrupted.

    Raises:
        StoppedError: a signal came; it was handed on, and what the run has is saved.
    """
    command = [sys.executable, "-m", "nybble", "train", str(trial.recipe_file)]
    if RunDirectory(trial.run_dir).last_checkpoint() is not None:
        command.append("--resume")
    elif (trial.run_dir / "run.json").is_file():
        command.append("--overwrite")
    last = ""
    # A session of its own: Ctrl+C in a terminal reaches this process alone, which hands it on once.
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
        _handing_on_signals(child),
    ):
        for line in child.stderr or ():
            file.write(line)
            file.flush()
            last = line.strip() or last
            watch.note(line.strip())
    if child.returncode in _STOPPED:
        raise StoppedError(f"stopped in {trial.run_dir.name}: saved; the same command again goes on from there")
    predicted = predict(trial.recipe) if child.returncode == _DOES_NOT_FIT else None
    return Ending(child.returncode, _reason(child.returncode, last), predicted)


def predict(recipe: Recipe) -> dict[str, Any] | None:
    """What a plan says of a run that does not fit; None where it does fit, and something else is lacking."""
    from nybble.planning import plan  # brings torch

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


def _reason(code: int, last: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return last.removeprefix("nybble: ") or f"ended with exit code {code}"


@contextmanager
def _handing_on_signals(child: subprocess.Popen[str]) -> Iterator[None]:
    def hand_on(_number: int, _frame: object) -> None:
        child.send_signal(signal.SIGINT)

    former: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                former[number] = signal.signal(number, hand_on)
            except ValueError:  # not in the main thread: the host program owns the signals
                break
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
