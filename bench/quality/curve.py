"""The loss curve of our step beside PEFT's on transformers: 100 steps from the same seed, without dropout.

Both train the same 4-bit base on the same rows in the same order, with AdamW at the same rate: ours on rows without
padding through our blocks, the other on padded rows through transformers' and PEFT's own code (`plain_path`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from bench.harness import Option, print_table, run
from bench.models import SMALL_MODELS
from nybble.data import FlatBatch, Groups, PadBatch, prepare_rows
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, load_tokenizer
from nybble.recipe import load_recipe
from nybble.training.parity import plain_path

BATCH = 8


def losses(recipe: Any, steps: int, ours: bool) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    source = find_model(recipe.model)
    tokenizer = load_tokenizer(source, recipe.model)
    rows = prepare_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed).train
    model, loaded = load_model(source, "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
    torch.manual_seed(1)
    model = attach(model, recipe.lora, "base").train()
    collate = FlatBatch() if ours else PadBatch(tokenizer.pad_token_id)
    groups, dtype = Groups(rows), getattr(torch, loaded.compute_dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    with nullcontext() if ours else plain_path(model):
        for step in range(steps):
            batch = collate([groups[(step * BATCH + i) % len(rows)] for i in range(BATCH)])
            n_items = int((batch["labels"][:, 1:] != -100).sum())
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(**batch, num_items_in_batch=n_items).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every model in both types."""
    cases: list[dict[str, Any]] = []

    def compared(model: str, dtype: str) -> tuple[str, ...]:
        values = {
            "model_name_or_path": str(asked.data / "models" / model),
            "dataset_name": str(asked.data / "rows" / "guanaco-llama2-1k.parquet"),
            "max_length": 256,
            "compute_dtype": dtype,
            "device": "cpu",
        }
        recipe = load_recipe(None, values)
        ours, peft = (torch.tensor(losses(recipe, asked.steps, side)) for side in (True, False))
        apart = ours - peft
        largest, mean = float(apart.abs().max()), float(apart.mean())
        cases.append({"model": model, "dtype": dtype, "largest": largest, "mean": mean})
        return model, dtype, f"{ours[0]:.4f}", f"{ours[-1]:.4f}", f"{largest:.1e}", f"{mean:+.1e}"

    def table() -> Iterator[tuple[str, ...]]:
        for model in SMALL_MODELS[: 1 if asked.tiny else None]:
            for dtype in ("float32", "bfloat16"):
                yield compared(model, dtype)

    print_table("model | type | first loss | last loss | largest difference | mean difference", table())
    return cases


if __name__ == "__main__":
    run(measure, __doc__, Option("steps", 100, tiny=2), data=True)
