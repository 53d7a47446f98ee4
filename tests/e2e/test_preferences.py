"""Preference objectives from rows to adapter: however a step is split, stopped or shared, the same is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nybble
from nybble.errors import RecipeError
from nybble.run.directory import read_lines
from nybble.storage.cache import Cache
from nybble.training import reference
from nybble.training.state import TrainState

N_ROWS = 15
WORDS = ("one", "two", "three", "four", "five")

Run = tuple[dict[str, torch.Tensor], list[dict[str, Any]], Any]


def rows_of(objective: str) -> list[dict[str, Any]]:
    """Short answers are better than wordy ones."""
    asked = [f"What is {WORDS[i % 5]}? " * (1 + i % 3) for i in range(N_ROWS)]
    good = [f"It is {WORDS[(i + 1) % 5]}" for i in range(N_ROWS)]
    bad = [f"{text} and {text}" for text in good]
    if objective == "kto":
        sides = zip(asked, good, bad, strict=True)
        return [
            {"prompt": ask, "completion": no if i % 3 else yes, "label": not i % 3}
            for i, (ask, yes, no) in enumerate(sides)
        ]
    return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(asked, good, bad, strict=True)]


@pytest.fixture
def settings(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    base = tiny_llama()

    def call(objective: str, name: str, **changes: Any) -> dict[str, Any]:
        rows = tmp_path / f"{objective}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(objective)))
        return {
            "model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(tmp_path / name),
            "objective": objective, "chat_template": "inst", "eval_fraction": 0, "n_samples": 0, "max_steps": 4,
            "per_device_train_batch_size": 8, "compute_dtype": "float32", "learning_rate": 0.01, "logging_steps": 1,
            "report_to": "none", "device": "cpu", "dataset_num_proc": 1, **changes,
        }  # fmt: skip

    return call


def trained(settings: dict[str, Any], **how: Any) -> Run:
    record = nybble.train(settings, observer=None, **how)
    return *left(Path(settings["output_dir"])), record


def left(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return load_file(run / "adapter" / "adapter_model.safetensors"), read_lines(run / "events.jsonl")


def check_same(one: Run, other: Run, *, within: float) -> None:
    for name, tensor in one[0].items():
        assert (other[0][name] - tensor).abs().max() <= within, name
    for a, b in zip(one[1], other[1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-4)
        for name, value in a["figures"].items():
            if name == "rewards/accuracies":  # at the start both rewards are 0 but for rounding
                continue
            assert b["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_splitting_a_step_changes_nothing(settings: Callable[..., dict[str, Any]], objective: str) -> None:
    changes = {"rpo_alpha": 0.5, "ld_alpha": 0.5} if objective == "dpo" else {}
    whole = trained(settings(objective, "whole", **changes))
    assert whole[1][-1]["loss"] < whole[1][0]["loss"]
    for rows, parts in ((2, 4), (1, 8)) if objective == "dpo" else ((2, 4),):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        check_same(whole, trained(settings(objective, f"{rows}x{parts}", **changes, **split)), within=2e-4)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_resumed_training_ends_with_the_same_bits(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    changes = {"save_steps": 2, "lora_dropout": 0.1, "logging_steps": 2, "precompute_ref_log_probs": objective == "kto"}
    whole = trained(settings(objective, "whole", **changes))
    finish = TrainState.finish_step

    def die(state: TrainState, *given: Any, **named: Any) -> None:
        finish(state, *given, **named)
        if state.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "finish_step", die)
        with pytest.raises(KeyboardInterrupt):
            trained(settings(objective, "torn", **changes))
    weights, events, _ = trained(settings(objective, "torn", **changes), on_existing="resume")
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[0].items())
    assert [(e["loss"], e["figures"]) for e in events] == [(e["loss"], e["figures"]) for e in whole[1]]


def test_an_interrupted_reference_goes_on_where_it_was(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_EXAMPLES_A_PART", 4)
    store, stored = Cache.store, []

    def die(cache: Cache, key: str, *given: Any) -> Any:
        done = store(cache, key, *given)
        if given[0] and "reference" in str(cache.path(key)):
            stored.append(key)
            if len(stored) == 2:
                raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "store", die)
        with pytest.raises(KeyboardInterrupt):
            trained(settings("dpo", "torn"))
    said: list[str] = []

    class Watch(nybble.run.record.Silent):  # type: ignore[name-defined, misc]
        def note(self, text: str) -> None:
            said.append(text)

    nybble.train(settings("dpo", "torn"), observer=Watch(), on_existing="resume")
    assert f"the reference's log-probabilities of {N_ROWS} rows, 8 from the cache" in said
    # With other weights under it, nothing of it is taken.
    nybble.train(settings("dpo", "other", seed=7), observer=Watch())
    assert f"the reference's log-probabilities of {N_ROWS} rows, 0 from the cache" in said
    monkeypatch.setenv("NYBBLE_CACHE", str(Path(settings("dpo", "x")["output_dir"]).parent / "empty"))
    check_same((*left(Path(settings("dpo", "torn")["output_dir"])), None), trained(settings("dpo", "new")), within=0)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_learn_what_one_does(
    settings: Callable[..., dict[str, Any]], launch: Callable[..., Any], tmp_path: Path, objective: str
) -> None:
    def words(name: str, rows: int) -> list[object]:
        split = {"per_device_train_batch_size": rows, "train_batch_size": 4, "eval_fraction": 0.2}
        return ["train", *(w for k, v in settings(objective, name, **split).items() for w in (f"--{k}", v))]

    assert launch(1, words("one", 4)).codes == (0,)
    outcome = launch(2, words("two", 2))
    assert outcome.codes == (0, 0), outcome.err
    check_same((*left(tmp_path / "one"), None), (*left(tmp_path / "two"), None), within=2e-4)
    one, two = (json.loads((tmp_path / n / "run.json").read_text())["evaluation_tuned"] for n in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, value in one["preferences"].items():
        assert two["preferences"][name] == (value if value is None else pytest.approx(value, rel=1e-3)), name


def test_held_out_pairs_are_judged_and_phases_planned(settings: Callable[..., dict[str, Any]]) -> None:
    *_, record = trained(settings("dpo", "run", eval_fraction=0.25, max_steps=12))
    before, after = record.evaluation_base.preferences, record.evaluation_tuned.preferences
    assert (before.accuracy, before.chosen_reward) == (None, None)  # the reference itself
    assert after.accuracy_low <= after.accuracy <= after.accuracy_high
    assert after.accuracy > 0.5
    assert after.margin == pytest.approx(after.chosen_reward - after.rejected_reward)
    assert record.evaluation_tuned.n_rows == after.n_rows
    assert "reference" in record.phases
    assert record.phases["reference"].predicted_bytes
    assert "answers" not in record.to_json()["evaluation_tuned"]


def test_training_goes_on_from_an_adapter_which_is_the_reference(settings: Callable[..., dict[str, Any]]) -> None:
    first = settings("dpo", "first", max_steps=3)
    trained(first)
    *_, record = trained(settings("dpo", "second", adapter_name_or_path=first["output_dir"], learning_rate=1e-9))
    events = read_lines(Path(record.run_dir) / "events.jsonl")
    assert events[-1]["loss"] == pytest.approx(0.693147, abs=1e-4)  # no distance to what it started from


def test_a_probe_is_refused(settings: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match=r"a probe compares supervised losses; objective kto has none"):
        nybble.probe(settings("kto", "probe"))
