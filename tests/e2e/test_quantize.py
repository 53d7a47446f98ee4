"""`nybble quantize`, and training on what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def test_the_checkpoint_trains_like_the_model_it_came_from(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    done = nybble("quantize", tiny_llama(), "--out", packed, "--json")
    assert done.code == 0, done.err
    assert done.json["n_packed"] == 14
    assert done.json["left_in_16bit"] == ["lm_head"]
    words = ("--dataset_name", rows_file, "--max_steps", "3", "--learning_rate", "1e-2", "--n_samples", "0")
    for name, base in (("a", tiny_llama()), ("b", packed)):
        done = nybble("train", "--model_name_or_path", base, "--output_dir", tmp_path / name, *words)
        assert done.code == 0, done.err
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
