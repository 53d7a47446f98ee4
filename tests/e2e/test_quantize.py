"""`nybble quantize`, and training on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nybble.quant import decode, from_bnb


def test_the_checkpoint_trains_like_the_model_it_came_from(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    done = nybble("quantize", tiny_llama(), "--out", packed, "--json")
    assert done.code == 0, done.err
    assert done.json["n_packed"] == 14
    assert done.json["left_in_16bit"] == ["lm_head"]
    check_checkpoint(packed, tiny_llama(), done.json)
    words = ("--dataset_name", rows_file, "--max_steps", "3", "--learning_rate", "1e-2", "--n_samples", "0")
    for name, base in (("a", tiny_llama()), ("b", packed)):
        done = nybble("train", "--model_name_or_path", base, "--output_dir", tmp_path / name, *words)
        assert done.code == 0, done.err
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(tensor.any() for name, tensor in a.items() if "lora_B" in name)  # and they did learn
    logs = [(tmp_path / name / "events.jsonl").read_text().splitlines() for name in "ab"]
    first, second = ([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in log] for log in logs)
    assert first == second


def check_checkpoint(packed: Path, base: Path, outcome: dict[str, Any]) -> None:
    """What lies there decodes to weights near those of the base; everything else is the base's own."""
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_4bit"], config["bnb_4bit_quant_type"]) == (
        "bitsandbytes",
        True,
        "nf4",
    )
    stored, weights = load_file(packed / "model.safetensors"), load_file(base / "model.safetensors")
    assert outcome["file_bytes"] == (packed / "model.safetensors").stat().st_size
    assert outcome["bits_per_weight"] < 4.6
    linears = [name for name in weights if f"{name}.absmax" in stored]
    assert len(linears) == outcome["n_packed"]
    for name, weight in weights.items():
        if name not in linears:
            assert torch.equal(stored[name], weight.to(stored[name].dtype)), name
            continue
        parts = {key.removeprefix(f"{name}."): stored[key] for key in stored if key.startswith(f"{name}.")}
        decoded = decode(from_bnb(stored[name], parts, tuple(weight.shape)), torch.float32)
        assert (decoded - weight).norm() < 0.1 * weight.norm(), name


def test_a_folder_that_exists_and_a_base_in_4_bits_are_refused(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    assert nybble("quantize", tiny_llama(), "--out", packed).code == 0
    files = {file.name: file.read_bytes() for file in packed.iterdir()}
    for model, out, said in (
        (tiny_llama(), packed, "already exists"),
        (packed, tmp_path / "again", "in 4 bits already"),
    ):
        done = nybble("quantize", model, "--out", out)
        assert done.code == 2
        assert said in done.err
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == files
    assert not (tmp_path / "again").exists()
