"""Experiment trackers by their names in accelerate: tensorboard, wandb, mlflow, trackio, swanlab and others.

train/loss, train/learning_rate, train/grad_norm, train/epoch, train/tokens_per_second, train/peak_memory_bytes
eval/loss, eval/exact_match    at step 0 those of the base, at the last step those of what is kept
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError
from nybble.recipe import TrainingSection
from nybble.run.record import Evaluation

# The argument by which each takes the name of the run; the others have none, or give it themselves.
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
# The variable that names the project, where it is not `WANDB_PROJECT` with the tracker's own name.
_PROJECT_VARIABLE = {"mlflow": "MLFLOW_EXPERIMENT_NAME", "comet_ml": "COMET_PROJECT_NAME"}


class Trackers:
    """The trackers of one run; each receives every logged step, and what is measured before and after."""

    def __init__(self, started: Sequence[Any] = ()) -> None:
        self._started = started
        self._step = 0

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers of a step by name, e.g. `train/loss`; what is None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        for tracker in self._started:
            tracker.log(known, step=step)
        self._step = step

    def log_evaluation(self, measured: Evaluation | None, step: int | None = None) -> None:
        """The figures of the held-out rows, if there are any, after `step` or the last step that was logged."""
        if measured is not None:
            values = {"eval/loss": measured.loss, "eval/exact_match": measured.exact_match}
            self.log(values, self._step if step is None else step)

    def finish(self) -> None:
        """End the run in each of them."""
        for tracker in self._started:
            tracker.finish()


def known_trackers() -> list[str]:
    """What `report_to` may name, whether it is installed or not."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return ["auto", "none", *sorted(LOGGER_TYPE_TO_CLASS)]


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


@contextmanager
def tracked(section: TrainingSection, run_path: Path, resumed_step: int | None) -> Iterator[Trackers]:
    """The trackers of a run whose folder is `run_path`, started; the run ends in them with the block.

    The variable `WANDB_PROJECT`, `TRACKIO_PROJECT` and so on names the project, which is else "nybble"; a run without
    `run_name` is called as its folder. The steps after `resumed_step` that tensorboard has already are dropped: the
    resumed run does them again.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    names = tracker_names(section)
    if names:
        PartialState(cpu=True)  # without it accelerate's own log messages raise errors
    started = []
    run_name = section.run_name or run_path.resolve().name
    for name in names:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            purge = None if resumed_step is None else resumed_step + 1
            tracker = kind("tensorboard", str(run_path), purge_step=purge)
        else:
            project = os.environ.get(_PROJECT_VARIABLE.get(name, f"{name.upper()}_PROJECT"), "nybble")
            if name == "aim":  # takes the run's name first
                tracker = kind(run_name, str(run_path), experiment=project)
            else:
                tracker = kind(project, **({_RUN_NAME[name]: run_name} if name in _RUN_NAME else {}))
        tracker.main_process_only = False  # only the first process starts any: accelerate's own state is not needed
        tracker.start()
        if name == "tensorboard":
            tracker.log({"training": section.model_dump_json(indent=1)}, step=0)
        else:
            tracker.store_init_configuration(section.model_dump(mode="json"))
        started.append(tracker)
    trackers = Trackers(started)
    try:
        yield trackers
    finally:
        trackers.finish()
