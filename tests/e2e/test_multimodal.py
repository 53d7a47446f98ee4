"""A multimodal checkpoint from its config to a merged model: planned, trained, asked, and written back as the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, Gemma3ForConditionalGeneration

import nybble as library
from nybble.models import towers
from nybble.recipe import load_recipe
from nybble.run.directory import RunDirectory
from tools.families import tiny_config, write_tiny

FAST = {"learning_rate": 1e-2, "max_steps": 20, "max_new_tokens": 8, "n_samples": 0, "device": "cpu", "max_length": 64}
IDS = torch.arange(4, 36).view(2, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    folder = write_tiny("cond:gemma3", tmp_path_factory.mktemp("gemma3"), tiny_llama())
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"<s>[INST] What is {words[i % 8]}? [/INST] It is {words[(i + 1) % 8]}. </s>"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    names = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(out)}
    library.train(load_recipe(None, {**FAST, **names}))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same_towers(base: Path, folder: Path) -> bool:
    before, after = tensors(base), tensors(folder)
    names = towers.tower_keys(AutoConfig.from_pretrained(base), before)
    return bool(names) and all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in names)


def test_it_trains_without_its_towers_on_flattened_rows(run: Path, base: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    text = sum(
        p.numel() for p in Gemma3ForConditionalGeneration.from_pretrained(base).model.language_model.parameters()
    )
    assert record["model"]["total_parameters"] == text  # the head is tied
    assert record["evaluation_tuned"]["loss"] < record["evaluation_base"]["loss"] - 0.5
    assert any("its towers are not loaded" in note for note in record["notes"])


def test_merged_it_is_verified_and_whole(nybble: Callable[..., Any], run: Path, base: Path, tmp_path: Path) -> None:
    done = nybble("merge", run, "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.json["verified"]
    assert same_towers(base, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    answers = [nybble("ask", folder, "What is one?", "--json").json for folder in (run, tmp_path / "merged")]
    assert answers[0]["answers"][0]["tuned"] == answers[1]["answers"][0]["tuned"]


def test_trained_whole_it_is_written_whole(base: Path, rows: Path, tmp_path: Path) -> None:
    names = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(tmp_path / "run")}
    library.train(load_recipe(None, {**FAST, **names, "method": "full", "learning_rate": 1e-3, "max_steps": 2}))
    full = RunDirectory(tmp_path / "run").full_model
    assert same_towers(base, full)
    before, after = (Gemma3ForConditionalGeneration.from_pretrained(folder) for folder in (base, full))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_a_plan_needs_the_config_alone(nybble: Callable[..., Any], tmp_path: Path) -> None:
    """Gemma 3 4B's shape: 3.88 billion parameters of 4.3 are text, and 3.2 of those are packed."""
    config = tiny_config("cond:gemma3")
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262_208}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "layer_types": None}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896}
    content = config.to_dict()
    content["text_config"] |= text
    content["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(content))
    done = nybble("plan", "--model_name_or_path", tmp_path, "--max_length", 64, "--json")
    assert done.json["total_parameters"] - done.json["trainable_parameters"] == 3_880_099_328 + 163_840
