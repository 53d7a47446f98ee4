"""The first steps beside the plain path: silent where both agree, a stop where a path computes something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.kernels import dispatcher

SETTINGS = {"max_steps": 4, "parity_steps": 3, "lora_dropout": 0.1, "n_samples": 0, "eval_fraction": 0}
# Relative differences of loss and gradients.
ALLOWED = {"float32": (1e-6, 1e-5), "bfloat16": (2e-2, 1e-1)}


@pytest.fixture
def flags(tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path) -> list[object]:
    named = {"model_name_or_path": tiny_llama(), "dataset_name": rows_file, "output_dir": tmp_path / "run", **SETTINGS}
    return [word for key, value in named.items() for word in (f"--{key}", value)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_paths_agree(nybble: Callable[..., Any], flags: list[object], method: str, dtype: str) -> None:
    done = nybble("train", *flags, "--method", method, "--compute_dtype", dtype, "--json")
    assert done.code == 0, done.err
    pattern = r"(\d+) micro-steps beside the plain path: loss within (\S+), gradients within (\S+)"
    [note] = filter(None, (re.fullmatch(pattern, text) for text in done.json["notes"]))
    loss, gradient = float(note[2]), float(note[3])
    loss_allowed, gradient_allowed = ALLOWED[dtype]
    assert (
        int(note[1])
        == SETTINGS["parity_steps"] * done.json["plan"]["rows_per_step"] // done.json["plan"]["micro_batch"]
    )
    assert loss <= loss_allowed
    assert 0 < gradient <= gradient_allowed  # two paths that round differently, and not one of them twice


def test_a_wrong_path_stops_before_it_is_trained_on(
    nybble: Callable[..., Any], flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = dispatcher.code("rows", torch.device("cpu"))
    right = rows.rms_norm_backward
    monkeypatch.setattr(rows, "rms_norm_backward", lambda *args: -right(*args))
    done = nybble("train", *flags)
    assert done.code == 3
    assert "step 1: the fast path gives loss" in done.err
    assert "% apart" in done.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_comparing_changes_nothing(nybble: Callable[..., Any], flags: list[object], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = []
    for steps in (0, 3):
        out = tmp_path / str(steps)
        done = nybble("train", *flags, "--parity_steps", steps, "--output_dir", out)
        assert done.code == 0, done.err
        found.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
