"""Methods and recipes side by side, by the command line; every arm is a process of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BROKEN = "1e30"  # a rate whose loss is no number after a step


@pytest.fixture
def recipe_file(tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(tiny_llama()),
        "dataset_name": str(rows_file),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 2,
        "max_new_tokens": 4,
        "eval_fraction": 0.2,
        "max_grad_norm": 0,
    }
    file.write_text(json.dumps(settings))
    return file


def test_methods_side_by_side_and_on_from_where_it_stopped(
    nybble: Callable[..., Any], recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run-compare"
    words = ("compare", recipe_file, "--methods", f"qlora,full={BROKEN}")
    done = nybble(*words, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found == json.loads((out / "comparison.json").read_text())
    qlora, full = found["arms"]
    wanted = {
        "method",
        "eval_loss",
        "train_loss",
        "peak_bytes",
        "tokens_per_second",
        "trainable_parameters",
        "measured",
    }
    assert wanted <= qlora.keys()
    assert (qlora["method"], qlora["measured"], qlora["status"]) == ("qlora", True, "done")
    assert qlora["eval_loss"] < qlora["base_loss"]
    assert qlora["eval_loss_interval"]["low"] < qlora["eval_loss"] < qlora["eval_loss_interval"]["high"]
    assert qlora["produced_bytes"] == (out / "qlora" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (full["measured"], full["status"]) == (False, "failed")
    assert "not a number at step" in full["error"]
    assert "full failed" in found["verdict"]
    assert "not a number at step" in (out / "full.log").read_text()
    rows = [json.loads(line)["tuned"] for line in (out / "qlora" / "held_out.jsonl").read_text().splitlines()]
    mean = math.fsum(row["loss"] for row in rows) / sum(row["n_tokens"] for row in rows)
    assert mean == pytest.approx(qlora["eval_loss"])

    before = (out / "qlora" / "run.json").stat().st_mtime_ns
    again = nybble(*words)  # only what is not done runs again
    assert again.code == 0, again.err
    assert "finished before" in again.err
    assert (out / "qlora" / "run.json").stat().st_mtime_ns == before
    assert "report.html" in again.out

    refused = nybble(*words, "--r", "3")
    assert refused.code == 2
    assert "is the comparison of another recipe" in refused.err
    assert nybble("report", out).code == 0


@pytest.mark.fresh
def test_two_recipes_without_held_out_rows(nybble: Callable[..., Any], recipe_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "dora.yaml"
    other.write_text(json.dumps({**json.loads(recipe_file.read_text()), "use_dora": True}))
    done = nybble("compare", recipe_file, other, "--out", tmp_path / "c", "--eval_fraction", "0", "--json")
    assert done.code == 0, done.err
    assert [arm["name"] for arm in done.json["arms"]] == ["recipe", "dora"]
    assert [arm["eval_loss"] for arm in done.json["arms"]] == [None, None]
    assert "No rows were held out" in done.json["verdict"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learning_rat", "1"), "did you mean 'learning_rate'"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(
    nybble: Callable[..., Any], recipe_file: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = nybble("compare", recipe_file, *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not (tmp_path / "run-compare").exists()


def test_what_does_not_fit_is_planned_and_not_run(
    nybble: Callable[..., Any], recipe_file: Path, tmp_path: Path
) -> None:
    done = nybble("compare", recipe_file, "--methods", "qlora,full", "--memory_budget", "1MB")
    assert done.code == 3
    assert "of 1.00 MB" in done.err
    folder = tmp_path / "run-compare"
    qlora, full = json.loads((folder / "comparison.json").read_text())["arms"]
    for arm in (qlora, full):
        assert (arm["status"], arm["measured"]) == ("does not fit", False)
        assert arm["predicted_bytes"] > 1e6
        assert arm["peak_bytes"] is None
    assert qlora["trainable_parameters"] < full["trainable_parameters"] == full["total_parameters"]
    assert "predicted, not run | predicted, not run" in (folder / "report.md").read_text()
    assert not (folder / "qlora").exists()


def test_where_no_arm_runs_the_reason_is_told(nybble: Callable[..., Any], recipe_file: Path, tmp_path: Path) -> None:
    done = nybble("compare", recipe_file, "--methods", "lora", "--dataset_name", tmp_path / "none.jsonl")
    assert done.code == 2
    assert "no arm could be run; the first:" in done.err
    assert "none.jsonl" in done.err
