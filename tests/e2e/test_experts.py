"""Runs on mixtures of experts: trained through packed experts, resumed, asked, merged, and read by stock libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nybble as library
from nybble.errors import StoppedError
from nybble.hardware import detect_device
from nybble.models import find_artifact, load_artifact
from nybble.recipe import load_recipe
from tools.families import write_tiny

IDS = torch.arange(4, 36).view(2, 16)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"<s>[INST] What is {WORDS[i % 8]}? [/INST] It is {WORDS[(i + 1) % 8]}. </s>"} for i in range(24)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


SETTINGS = {
    "learning_rate": 1e-2,
    "max_steps": 20,
    "save_steps": 10,
    "max_new_tokens": 8,
    "n_samples": 0,
    "device": "cpu",
    "report_to": "none",
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], rows: Path) -> Path:
    """A run with a base of its own; do not write."""
    folder = tmp_path_factory.mktemp("mixtral")
    write_tiny("mixtral", folder / "base", tiny_llama())
    places = {"model_name_or_path": folder / "base", "dataset_name": rows, "output_dir": folder / "run"}
    library.train(load_recipe(None, {**SETTINGS, **{name: str(path) for name, path in places.items()}}))
    return folder / "run"


def test_a_run_learns_through_packed_experts_and_is_merged(
    trained: Path, nybble: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len([name for name in adapter if "mlp.experts" in name]) == 8  # A and B of two stacks in two layers
    assert not [name for name in adapter if "gate." in name]
    losses = [json.loads(line)["loss"] for line in (trained / "events.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    out = tmp_path / "merged"
    done = nybble("merge", trained, "--out", out, "--into", "dequantized", "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    assert done.json["verified"]
    assert done.json["mean_kl"] < 1e-6
    model, _, _ = load_artifact(find_artifact(str(trained)), detect_device("cpu"))
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        wanted, logits = (m(input_ids=IDS, use_cache=False).logits for m in (model, stock))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    answer = nybble("ask", trained, "What is one?", "--max_new_tokens", "4", "--json")
    assert answer.code == 0, answer.err


@pytest.mark.nightly
def test_a_resumed_run_ends_with_the_same_bits(trained: Path, rows: Path, tmp_path: Path) -> None:
    places = {"model_name_or_path": trained.parent / "base", "dataset_name": rows, "output_dir": tmp_path / "run"}
    settings = {**SETTINGS, **{name: str(path) for name, path in places.items()}}
    with pytest.raises(StoppedError):
        library.train(load_recipe(None, {**settings, "max_seconds": 0.001}))
    library.train(load_recipe(None, settings), on_existing="resume")
    again, once = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "run", trained))
    assert again.keys() == once.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())
