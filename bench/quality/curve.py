"""The loss curve of our step beside PEFT's on transformers: 100 steps from the same seed, without dropout.

    python -m bench.quality.curve --data ../shared/data [--steps 100]

Both train the same 4-bit base on the same rows in the same order, with AdamW at the same rate: ours on rows without
padding through our blocks, the other on padded rows through transformers' and PEFT's own code (`parity.plain_path`).
Prints a Markdown table and one JSON object last.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nybble.data import FlatBatch, Groups, PadBatch, prepare_rows
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, load_tokenizer
from nybble.recipe import load_recipe
from nybble.training import software_versions
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


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    cases = []
    print("| model | type | first loss | last loss | largest difference | mean difference |")
    print("|---|---|---:|---:|---:|---:|")
    for name in ("stories260K", "TinyStories-656K"):
        for dtype in ("float32", "bfloat16"):
            values = {
                "model_name_or_path": str(asked.data / "models" / name),
                "dataset_name": str(asked.data / "rows" / "guanaco-llama2-1k.parquet"),
                "max_length": 256,
                "compute_dtype": dtype,
                "device": "cpu",
            }
            recipe = load_recipe(None, values)
            ours, peft = (torch.tensor(losses(recipe, asked.steps, side)) for side in (True, False))
            apart = ours - peft
            figures = {"largest": float(apart.abs().max()), "mean": float(apart.mean())}
            cases.append({"model": name, "dtype": dtype, **figures})
            print(
                f"| {name} | {dtype} | {ours[0]:.4f} | {ours[-1]:.4f} | {figures['largest']:.1e} "
                f"| {figures['mean']:+.1e} |",
                flush=True,
            )
    print(json.dumps({"benchmark": "curve", "steps": asked.steps, "cases": cases, "versions": software_versions()}))


if __name__ == "__main__":
    main()
