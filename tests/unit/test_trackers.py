"""What trackers are told, and what is found in those that are installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nybble.errors import CannotRunError
from nybble.recipe import TrainingSection
from nybble.run.record import Evaluation
from nybble.training.trackers import tracked, tracker_names


def test_trackers_are_told_numbers_and_the_names_of_project_and_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from accelerate import tracking

    told: list[Any] = []

    class Fake(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, project: str, **named: str) -> None:
            super().__init__(_blank=True)
            told.append((project, named))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values["learning_rate"])

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            told.append((values, step))

        def finish(self) -> None:
            told.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.WANDB])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    section = TrainingSection(report_to="wandb", run_name="first", learning_rate=0.5)
    with tracked(section, tmp_path, None) as trackers:
        trackers.log({"train/loss": 1.5, "train/grad_norm": None}, 3)
    assert told == [("mine", {"name": "first"}), 0.5, ({"train/loss": 1.5}, 3), "finished"]
    with pytest.raises(CannotRunError, match="report_to: 'mlflow' is not installed; installed: wandb"):
        tracker_names(TrainingSection(report_to="mlflow"))


def of_tensorboard(_own: Path, run: Path) -> tuple[str, str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in run.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(folder)).Reload()
    return "nybble", "mine", [(event.step, event.value) for event in read.Scalars("eval/loss")]


def records_of_wandb(file: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, of parts with checksum, length and kind."""
    content, at, record = file.read_bytes(), 7, b""  # behind wandb's own header
    while at + 7 <= len(content):
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""
        if (left := -at % 32768) < 7:
            at += left


def of_wandb(own: Path, _run: Path) -> tuple[str, str, list[tuple[int, float]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    project, name, losses = "", "", []
    for data in records_of_wandb(next(own.rglob("*.wandb"))):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            project, name = record.run.project, record.run.display_name
        values = {item.key or "".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "eval/loss" in values:
            losses.append((values["_step"], values["eval/loss"]))
    return project, name, losses


def of_mlflow(own: Path, _run: Path) -> tuple[str, str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{own}/mlflow.db")
    experiment = client.get_experiment_by_name("nybble")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "eval/loss")
    return experiment.name, run.info.run_name, [(metric.step, metric.value) for metric in history]


def of_trackio(own: Path, _run: Path) -> tuple[str, str, list[tuple[int, float]]]:
    import sqlite3

    with sqlite3.connect(own / "nybble.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    values = [(name, step, json.loads(text)) for name, step, text in found]
    return "nybble", values[0][0], [(step, text["eval/loss"]) for _, step, text in values if "eval/loss" in text]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_trackers_that_are_installed_get_names_and_losses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each of them has on disk afterwards."""
    own, run = tmp_path / "own", tmp_path / "mine"
    for folder in (own, run):
        folder.mkdir()
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(own),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{own}/mlflow.db",
        "TRACKIO_DIR": str(own),
    }
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    pytest.importorskip(name, reason=f"{name} is not installed")
    base, tuned = (Evaluation(loss, 1.0, 1, 1, None, 0.0) for loss in (4.0, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these libraries
        with tracked(TrainingSection(report_to=name), run, None) as trackers:
            trackers.log_evaluation(base, step=0)
            trackers.log({"train/loss": 3.0, "train/tokens_per_second": 50.0}, 7)
            trackers.log_evaluation(tuned)
        found = globals()[f"of_{name}"](own, run)
    assert found == ("nybble", "mine", [(0, 4.0), (7, 2.0)])
