"""Settings that must not change what is learned do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.run.directory import read_lines

# float32 and no dropout: what remains is the order of summation.
EXACT = {
    "compute_dtype": "float32",
    "max_steps": "6",
    "learning_rate": "1e-3",
    "n_samples": "0",
    "eval_fraction": "0",
    "logging_steps": "1",
}


@pytest.fixture
def adapter_after(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> Callable[..., dict[str, torch.Tensor]]:
    """`adapter_after(setting=value)` -> the adapter that six steps leave."""

    def call(**changes: object) -> dict[str, torch.Tensor]:
        out = tmp_path / "-".join(f"{k}={v}" for k, v in changes.items())
        flags = {"model_name_or_path": tiny_llama(), "dataset_name": rows_file, "output_dir": out, **EXACT, **changes}
        done = nybble("train", *(word for key, value in flags.items() for word in (f"--{key}", value)))
        assert done.code == 0, done.err
        return load_file(out / "adapter" / "adapter_model.safetensors")

    return call


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_splitting_a_batch_changes_nothing(
    adapter_after: Callable[..., Any], tmp_path: Path, batch: int, accumulation: int
) -> None:
    whole = adapter_after(per_device_train_batch_size=8)
    split = adapter_after(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    # Adam turns rounding in a tiny gradient into a visible step; measured 3e-6, a wrong normalisation gives 1e-3.
    assert largest_difference(whole, split) < 5e-5
    # Clipping and Adam hide a factor on all gradients; the logged figures do not.
    runs = [read_lines(path) for path in sorted(tmp_path.glob("*/events.jsonl"))]
    assert len(runs) == 2
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_recomputation_changes_nothing(adapter_after: Callable[..., Any]) -> None:
    plain = adapter_after(gradient_checkpointing="false")
    recomputed = adapter_after(gradient_checkpointing="true")
    assert largest_difference(plain, recomputed) == 0.0


def test_the_lean_way_changes_nothing(adapter_after: Callable[..., Any]) -> None:
    plain = adapter_after(lora_dropout="0.1")
    lean = adapter_after(lora_dropout="0.1", lean="always")
    assert largest_difference(plain, lean) < 5e-5  # the same sums in another order, as in splitting a batch


@pytest.mark.parametrize("packing", ["true", "96"])
def test_packing_trains_on_the_same_tokens(adapter_after: Callable[..., Any], packing: str) -> None:
    """All rows in one step: how they are grouped cannot matter."""
    rows = adapter_after(per_device_train_batch_size=64, max_steps=2)
    packed = adapter_after(per_device_train_batch_size=64, max_steps=2, packing=packing)
    assert largest_difference(rows, packed) < 5e-5


def test_the_seed_decides_everything(adapter_after: Callable[..., Any]) -> None:
    first = adapter_after(seed=1, lora_dropout="0.1")
    again = adapter_after(lora_dropout="0.1", seed=1)
    other = adapter_after(seed=2, lora_dropout="0.1")
    assert largest_difference(first, again) == 0.0
    assert largest_difference(first, other) > 1e-3
