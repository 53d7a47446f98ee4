"""Encoders and starts of adapters, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.run import progress

Run = Callable[..., Any]
SHORT = ("--max_steps", "4", "--learning_rate", "1e-2", "--n_samples", "1", "--max_new_tokens", "4")


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("words", [("--encoder", "calibrated"), ("--init", "qera"), ("--init", "pissa")], ids=str)
def test_a_calibrated_run_keeps_its_base_and_answers_from_it(
    words: tuple[str, ...],
    nybble: Run,
    tiny_llama: Callable[..., Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    run = tmp_path / "run"
    given = ("--model_name_or_path", tiny_llama(), "--dataset_name", rows_file, "--output_dir", run)
    done = nybble("train", *given, *SHORT, *words)
    assert done.code == 0, done.err
    assert "calibrating 2/2" in done.err
    record = json.loads((run / "run.json").read_text())
    assert (record["model"]["calibration"]["tokens"] > 0) == ("pissa" not in words)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == run / "base"
    assert record["phases"]["calibrate"]["seconds"] > 0
    assert nybble("ask", run, "What is one?").code == 0


def test_a_resumed_run_goes_on_with_the_base_it_began_with(
    nybble: Run, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    given = (
        "--model_name_or_path",
        tiny_llama(),
        "--dataset_name",
        rows_file,
        "--encoder",
        "calibrated",
        "--init",
        "qera",
    )
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    schedule = ("--lr_scheduler_type", "constant", "--save_steps", "2", "--learning_rate", "1e-2", "--n_samples", "0")
    assert nybble("train", *given, *schedule, "--output_dir", whole, "--max_steps", "4").code == 0
    assert nybble("train", *given, *schedule, "--output_dir", parted, "--max_steps", "2").code == 0
    resumed = nybble("train", *given, *schedule, "--output_dir", parted, "--max_steps", "4", "--resume", "--force")
    assert resumed.code == 0, resumed.err
    assert "calibrating" not in resumed.err
    a, b = adapter(whole), adapter(parted)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_quantize_calibrates_on_rows(
    nybble: Run, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    for encoder in ("absmax", "search", "calibrated"):
        words = (
            ("--encoder", encoder, "--dataset_name", rows_file) if encoder == "calibrated" else ("--encoder", encoder)
        )
        done = nybble("quantize", tiny_llama(torch.bfloat16), "--out", tmp_path / encoder, "--json", *words)
        assert done.code == 0, done.err
    files = [load_file(tmp_path / encoder / "model.safetensors") for encoder in ("absmax", "search", "calibrated")]
    name = "model.layers.0.mlp.up_proj.weight"
    assert [f[name].shape for f in files] == [files[0][name].shape] * 3
    assert not torch.equal(files[0][name], files[1][name])
    assert not torch.equal(files[1][name], files[2][name])
    assert torch.equal(files[1][f"{name}.absmax"], files[2][f"{name}.absmax"])


def test_a_calibrated_base_is_made_again_and_cached(
    nybble: Run, tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    model = tiny_llama(torch.bfloat16)
    given = ("--model_name_or_path", model, "--dataset_name", rows_file, "--encoder", "calibrated", "--seed", "3")
    first = nybble("train", *given, *SHORT, "--eval_fraction", "0.2", "--output_dir", tmp_path / "first")
    assert first.code == 0, first.err
    card = (tmp_path / "first" / "adapter" / "README.md").read_text()
    assert "nybble quantize MODEL --recipe RUN/recipe.yaml --out FOLDER" in card
    recipe = tmp_path / "first" / "recipe.yaml"
    for name, cache in (("again", "false"), ("cached", "true")):
        done = nybble("quantize", model, "--recipe", recipe, "--out", tmp_path / name, "--cache", cache)
        assert done.code == 0, done.err
        made = (tmp_path / name / "model.safetensors").read_bytes()
        assert made == (tmp_path / "first" / "base" / "model.safetensors").read_bytes()
    second = nybble("train", *given, *SHORT, "--eval_fraction", "0.2", "--output_dir", tmp_path / "second")
    assert second.code == 0, second.err
    assert "the calibrated base is taken from the cache" in second.err
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("first", "second")]
    assert records[0]["model"]["calibration"] == records[1]["model"]["calibration"]
    assert records[0]["evaluation_base"]["loss"] == records[1]["evaluation_base"]["loss"]
    a, b = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert all(torch.equal(a[key], b[key]) for key in a)
    for words in (("--calibration_rows", "2"), ("--seed", "4"), ("--init", "qera")):
        other = nybble("train", *given, *SHORT, "--eval_fraction", "0.2", *words, "--output_dir", tmp_path / words[1])
        assert other.code == 0, other.err
        assert "from the cache" not in other.err
