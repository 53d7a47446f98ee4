"""Experiment trackers by their names in accelerate: tensorboard, wandb, mlflow, trackio, swanlab and others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError
from nybble.recipe import TrainingSection

# The argument by which each takes the name of the run.
_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


class Trackers:
    """The trackers of one run; each receives every logged step."""

    def __init__(self, started: Sequence[Any] = ()) -> None:
        self._started = started

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers of a step by name, e.g. `train/loss`; what is None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        for tracker in self._started:
            tracker.log(known, step=step)

    def finish(self) -> None:
        """End the run in each of them."""
        for tracker in self._started:
            tracker.finish()


def tracker_names(section: TrainingSection) -> list[str]:
    """The trackers that `section.report_to` asks for.

    Raises:
        CannotRunError: one is asked for by name and its library is missing.
    """
    from accelerate.tracking import get_available_trackers

    available = [tracker.value for tracker in get_available_trackers()]
    if section.report_to == "auto":
        return [name for name in available if name == "tensorboard"]
    wanted = [name.strip() for name in section.report_to.split(",") if name.strip() not in ("", "none")]
    for name in wanted:
        if name not in available:
            raise CannotRunError(f"report_to: {name!r} is not installed; installed: {', '.join(available) or 'none'}")
    return wanted


def start_trackers(section: TrainingSection, run_path: Path, resumed_step: int | None) -> Trackers:
    """Start the trackers of a run whose folder is `run_path`.

    The variable `WANDB_PROJECT`, `TRACKIO_PROJECT` and so on names the project, which is else "nybble". The steps after
    `resumed_step` that tensorboard has already are dropped: the resumed run does them again.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    started = []
    for name in tracker_names(section):
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            purge = None if resumed_step is None else resumed_step + 1
            tracker = kind("tensorboard", str(run_path), purge_step=purge)
        else:
            project = os.environ.get(f"{name.upper()}_PROJECT", "nybble")
            named = {_RUN_NAME[name]: section.run_name} if section.run_name and name in _RUN_NAME else {}
            folder = [str(run_path)] if kind.requires_logging_directory else []
            tracker = kind(project, *folder, **named)
        tracker.main_process_only = False  # only the first process starts any: accelerate's own state is not needed
        tracker.start()
        if name == "tensorboard":
            tracker.log({"training": section.model_dump_json(indent=1)}, step=0)
        else:
            tracker.store_init_configuration(section.model_dump(mode="json"))
        started.append(tracker)
    return Trackers(started)
