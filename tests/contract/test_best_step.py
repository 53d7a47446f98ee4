"""The best evaluation is kept, loaded at the end and waited for; a training that is stopped loses none of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.errors import StoppedError
from nybble.recipe import EvaluationSection
from nybble.run.record import Evaluation
from nybble.storage.checkpoints import list_checkpoints
from nybble.training.best import BestStep

World = Callable[..., Any]
LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 7: 2.5}  # by step; the second evaluation is the best


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[int]]:
    """`planned(losses)`: evaluations after these steps give these losses; returns the steps that are evaluated."""

    def plan(losses: dict[int, float]) -> list[int]:
        seen: list[int] = []

        def measure(model: Any, *_: Any) -> Evaluation:
            assert model is not None
            step = seen_by[-1]
            seen.append(step)
            return Evaluation(losses[step], 0.0, 1, 1, None, 0.0)

        monkeypatch.setattr("nybble.training.loop.evaluate_quickly", measure)
        monkeypatch.setattr("nybble.training.loop.sample_answers", note_step)
        return seen

    seen_by: list[int] = []

    def note_step(*_: Any, step: int) -> list[Any]:
        seen_by.append(step)
        return []

    return plan


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_weights(model: Any, folder: Path) -> None:
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    stored = weights_of(folder)
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)


@pytest.mark.parametrize("save_total_limit", [1, 2])
def test_the_best_weights_are_kept_and_loaded(
    world: World, planned: Callable[..., list[int]], tmp_path: Path, save_total_limit: int
) -> None:
    seen = planned(LOSSES)
    made = world(eval_steps=2, load_best_model_at_end=True, save_steps=1, save_total_limit=save_total_limit)
    done = made.train(tmp_path / "out", held_out=True)
    assert seen == [2, 4, 6, 7]
    assert done.best == {"step": 4, "metric": "eval_loss", "value": 1.0}
    assert done.weights_step == 4
    assert "best eval_loss 1.0000 at step 4, its weights are taken" in made.said
    names = [path.name for path in list_checkpoints([tmp_path / "out" / "checkpoints"])]
    assert names == ["checkpoint-7", *(["checkpoint-6"] if save_total_limit == 2 else []), "checkpoint-4"]
    assert_weights(made.model, tmp_path / "out" / "checkpoints" / "checkpoint-4")


def test_the_last_weights_stay_where_they_are_the_best_or_nothing_is_loaded(
    world: World, planned: Callable[..., list[int]], tmp_path: Path
) -> None:
    planned({2: 3.0, 4: 1.0, 6: 2.0, 7: 0.5})
    made = world(eval_steps=2, load_best_model_at_end=True)
    made.train(tmp_path / "last", held_out=True)
    assert_weights(made.model, tmp_path / "last" / "checkpoints" / "checkpoint-7")
    planned(LOSSES)
    made = world(eval_steps=2, early_stopping_patience=9)
    patient = made.train(tmp_path / "patient", held_out=True)
    assert (patient.best["step"], patient.weights_step) == (4, 7)
    assert_weights(made.model, tmp_path / "patient" / "checkpoints" / "checkpoint-7")


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_weights_and_is_said(
    world: World, planned: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned(LOSSES)
    made = world(eval_steps=2, load_best_model_at_end=True)
    monkeypatch.setattr("nybble.training.checkpoint.CheckpointWriter.checkpoint_of", lambda *_: None)
    made.train(tmp_path / "out", held_out=True)
    assert any(text.endswith("or is damaged: the last weights are kept") for text in made.said)
    assert_weights(made.model, tmp_path / "out" / "checkpoints" / "checkpoint-7")


def logged(out: Path) -> list[int]:
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["loss"] is not None]


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 2, 4, 6, 7]), (7, [1, 7]), (10, [1, 7])])
def test_the_last_step_is_always_logged(world: World, tmp_path: Path, every: int, steps: list[int]) -> None:
    world(logging_steps=every).train(tmp_path)
    assert logged(tmp_path) == steps


def test_patience_ends_the_training(world: World, planned: Callable[..., list[int]], tmp_path: Path) -> None:
    seen = planned({1: 3.0, 2: 1.0, 3: 1.5, 4: 1.2, 5: 0.1})
    made = world(eval_steps=1, early_stopping_patience=2, load_best_model_at_end=True, logging_steps=3)
    done = made.train(tmp_path / "out", held_out=True)
    assert (done.steps, seen) == (4, [1, 2, 3, 4])
    assert logged(tmp_path / "out") == [1, 3, 4]
    assert "stopped early at step 4 of 7, best eval_loss 1.0000 at step 2, its weights are taken" in made.said
    resumed = made.train(tmp_path / "out", held_out=True, resume=True)  # nothing is left to do
    assert (resumed.steps, resumed.best, seen) == (4, done.best, [1, 2, 3, 4])
    assert_weights(made.model, tmp_path / "out" / "checkpoints" / "checkpoint-2")


@pytest.mark.parametrize("at", [4, 8, 11])
def test_a_stopped_training_ends_as_the_undisturbed_one(
    world: World, planned: Callable[..., list[int]], stop_after: Callable[[int | None], None], tmp_path: Path, at: int
) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 1.5, 4: 1.2, 5: 1.1, 6: 0.1}
    made = world(eval_steps=1, early_stopping_patience=3, load_best_model_at_end=True)
    planned(losses)
    stop_after(None)
    straight = made.train(tmp_path / "straight", held_out=True)
    kept = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    seen = planned(losses)
    stop_after(at)
    with pytest.raises(StoppedError):
        made.train(tmp_path / "out", held_out=True)
    stop_after(None)
    resumed = made.train(tmp_path / "out", held_out=True, resume=True)
    assert (resumed.best, resumed.steps, resumed.train_loss) == (straight.best, straight.steps, straight.train_loss)
    assert seen == [1, 2, 3, 4, 5]
    assert all(torch.equal(p, kept[name]) for name, p in made.model.named_parameters() if p.requires_grad)
    states = [
        json.loads((tmp_path / name / "checkpoints" / "checkpoint-5" / "state.json").read_text())["best"]
        for name in ("straight", "out")
    ]
    assert states[0] == states[1] == {"step": 2, "value": 1.0, "n_waited": 3}


@pytest.mark.parametrize(
    ("changes", "evaluated", "saved"),
    [
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [3, 6], [7, 6, 3]),
        ({"eval_steps": 0.4, "save_steps": 0.3}, [3, 6], [7, 6, 3]),  # of seven steps: three
        ({"eval_strategy": "steps", "logging_steps": 3, "save_strategy": "best"}, [3, 6], [7, 3]),
        ({"eval_strategy": "no", "eval_steps": 1, "save_strategy": "no"}, [], []),
        ({"eval_steps": 2, "save_strategy": "steps", "save_steps": 5}, [2, 4, 6], [7, 5]),
    ],
)
def test_the_strategies(
    world: World,
    planned: Callable[..., list[int]],
    tmp_path: Path,
    changes: dict[str, Any],
    evaluated: list[int],
    saved: list[int],
) -> None:
    seen = planned(dict.fromkeys(range(8), 1.0))
    made = world(**{**changes, "save_total_limit": 9})
    made.train(tmp_path / "out", held_out=True)
    assert seen == evaluated
    assert [path.name for path in list_checkpoints([tmp_path / "out" / "checkpoints"])] == [
        f"checkpoint-{step}" for step in saved
    ]


def test_a_stop_saves_even_where_no_checkpoints_are_wanted(
    world: World, stopped: Callable[..., Path], tmp_path: Path
) -> None:
    out = stopped(world(save_strategy="no"), tmp_path / "out")
    assert [path.name for path in list_checkpoints([out / "checkpoints"])] == ["checkpoint-1.2"]


@pytest.mark.parametrize(
    ("settings", "values", "best", "waited"),
    [
        ({}, [2.0, 1.0, 1.5], 1, 1),
        ({}, [float("nan"), 2.0, float("nan")], 1, 1),
        ({"greater_is_better": True}, [2.0, 1.0, 3.0], 2, 0),
        ({"metric_for_best_model": "exact_match"}, [0.5, 0.75, 0.25], 1, 1),
        ({"metric_for_best_model": "eval_exact_match", "greater_is_better": False}, [0.5, 0.75, 0.25], 2, 0),
        ({"early_stopping_threshold": 0.4}, [2.0, 1.8, 1.5, 1.0], 3, 0),  # 1.8 and 1.5 are better, but by too little
        ({"early_stopping_threshold": 0.4}, [2.0, 1.8, 1.5], 2, 2),
    ],
)
def test_what_is_the_best(settings: dict[str, Any], values: list[float], best: int, waited: int) -> None:
    follower = BestStep(EvaluationSection(**settings))
    for step, value in enumerate(values):
        is_loss = follower.metric == "eval_loss"
        figures = (value, 0.0, 1, 1, None) if is_loss else (9.0 - step, 0.0, 1, 1, value)
        follower.judge(step, Evaluation(*figures, 0.0))
    assert (follower.step, follower.n_waited) == (best, waited)
    other = BestStep(EvaluationSection(**settings))
    other.load_state_dict(json.loads(json.dumps(follower.state_dict())))
    assert other.state_dict() == follower.state_dict()


def test_the_best_step_follows_as_the_callback_of_transformers_does(tmp_path: Path) -> None:
    """The same figures to EarlyStoppingCallback end at the same evaluation."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    values = [2.0, 1.9, 1.7, 1.75, 1.69, 1.5, 1.6, 1.49, 1.48, 1.47]
    theirs, ours = [], []
    state = TrainerState()
    callback = EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=0.15)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="loss", greater_is_better=False, use_cpu=True, report_to="none"
    )
    follower = BestStep(EvaluationSection(early_stopping_patience=3, early_stopping_threshold=0.15))
    for step, value in enumerate(values):
        control = TrainerControl()
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        if state.best_metric is None or value < state.best_metric:
            state.best_metric = value
        theirs.append(control.should_training_stop)
        follower.judge(step, Evaluation(value, 0.0, 1, 1, None, 0.0))
        ours.append(follower.is_over)
    assert ours == theirs
    assert True in ours
