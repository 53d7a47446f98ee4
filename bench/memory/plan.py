"""Predicted against measured: the planner's peaks, and real training runs whose live tensors are counted.

A real run is `nybble.training.train_model` on real tensors: transformers' Trainer, its loader, clipping, AdamW. Two
steps are trained with a fixed number of recomputed layers; the highest number of live bytes is compared with the peak
that the plan derives from config.json alone. Prints the table as Markdown and one JSON object last.

    python -m bench.memory.plan --models DIR [DIR ...]

The folders hold small real models; shapes of about 160M are made here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nybble.data import Example, Groups
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, materialize, meta_model
from nybble.nn.scratch import scratch
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.traced_step import BatchShape, adopt
from nybble.recipe import Recipe, StepMemory, load_recipe
from nybble.run.directory import RunDirectory
from nybble.run.record import Silent
from nybble.training import Setup, software_versions, train_model


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str  # a folder, or the name of a shape below
    method: str = "qlora"
    length: int = 128
    batch: int = 4
    recompute: str = "none"  # none, some or all
    r: int = 8
    targets: str = "all-linear"
    dropout: float = 0.0


def shape(name: str) -> Any:
    """Configs of about 160M weights."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    }
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "llama-160m": ("llama", {**sizes, "vocab_size": 32000}),
        "llama-160m-tied": ("llama", {**sizes, "vocab_size": 32000, "tie_word_embeddings": True}),
        "qwen2-160m-wide": (
            "qwen2",
            {
                **sizes,
                "num_hidden_layers": 8,
                "num_key_value_heads": 4,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
            },
        ),
        "gemma3-60m": (
            "gemma3_text",
            {
                **sizes,
                "hidden_size": 512,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "vocab_size": 32000,
                "sliding_window": 64,
            },
        ),
    }
    kind, settings = shapes[name]
    return AutoConfig.for_model(kind, **settings)


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case; two steps."""
    settings = {
        "model_name_or_path": case.model,
        "method": case.method,
        "r": case.r,
        "target_modules": case.targets,
        "lora_dropout": case.dropout,
        "max_length": case.length,
        "per_device_train_batch_size": case.batch,
        "max_steps": 2,
        "cache": "false",
        "report_to": "none",
        "device": "cpu",
    }
    return load_recipe(None, settings)


def depth_of(case: Case, n_layers: int) -> int:
    """Layers that are recomputed."""
    return {"none": 0, "some": n_layers // 2, "all": n_layers}[case.recompute]


def predicted(case: Case, config: Any, recipe: Recipe) -> int:
    """The plan's peak of live tensors in two steps, bytes."""
    setting = TracedModel(config, recipe, torch.bfloat16)
    curve = StepAtLevels(setting, BatchShape((case.length,) * case.batch, case.batch * (case.length - 1)))
    return curve.steady(depth_of(case, setting.n_layers)).peak.total_bytes


def measured(case: Case, config: Any, recipe: Recipe, folder: Path) -> int:
    """The peak of live tensors while the real trainer runs, bytes."""
    device = detect_device("cpu")
    scratch.clear()
    if Path(case.model).is_dir():
        source = find_model(recipe.model)
        model, _ = load_model(source, case.method, recipe.model, recipe.quantization, device)
        if case.method != "full":
            model = attach(model, recipe.lora, source.name)
    else:
        model = meta_model(config, recipe, torch.bfloat16)
        materialize(model)
    n_layers = config.num_hidden_layers
    depth = depth_of(case, n_layers)
    # A curve on which exactly this depth is the first that fits.
    steps = tuple(0 if d >= depth else 1 << 60 for d in range(n_layers + 1))
    memory = StepMemory((1, 2), (steps, steps), 0)
    ids = [1] * case.length
    rows = [Example(ids, ids, 1, 1, 0, (2,), 0, 0, False) for _ in range(2 * case.batch)]
    setup = Setup(RunDirectory(folder), device, torch.bfloat16, Silent(), lambda _: 0.0, 0, 2, memory)
    section = recipe.training.model_copy(update={"output_dir": str(folder)})
    live = MemoryTracer()
    adopt(live, model)
    with live:
        live.start("train")
        train_model(model, None, Groups(rows), section, setup)
    scratch.clear()
    return max(peak.total_bytes for peak in live.peaks.values())


def cases(folders: list[str]) -> list[Case]:
    """The grid."""
    found = []
    for folder in folders:
        for method in ("qlora", "lora", "full"):
            for length, recompute in ((64, "none"), (128, "some"), (256, "all")):
                found.append(Case(folder, method, length, 4, recompute))
            found.append(Case(folder, method, 128, 1, "none", r=16, targets="q_proj,v_proj", dropout=0.1))
    base = Case("llama-160m")
    found += [
        replace(base, recompute=recompute, length=length)
        for recompute in ("none", "some", "all")
        for length in (128, 512)
    ]
    found += [
        replace(base, method=method, recompute=recompute)
        for method in ("lora", "full")
        for recompute in ("none", "all")
    ]
    found += [replace(base, model="llama-160m-tied", method=method) for method in ("qlora", "full")]
    found += [replace(base, model="qwen2-160m-wide", method=method, batch=1) for method in ("qlora", "lora", "full")]
    found += [replace(base, model="gemma3-60m", recompute=recompute) for recompute in ("none", "some", "all")]
    found += [replace(base, r=64, dropout=0.1), replace(base, r=8, targets="q_proj,v_proj", dropout=0.1)]
    return found


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--first", type=int, default=0, help="leave out so many cases")
    parser.add_argument("--last", type=int, help="end behind so many cases")
    asked = parser.parse_args()
    rows = []
    for case in cases(asked.models)[asked.first : asked.last]:
        recipe = recipe_of(case)
        config = find_model(recipe.model).config if Path(case.model).is_dir() else shape(case.model)
        started = time.monotonic()
        expected = predicted(case, config, recipe)
        seconds = time.monotonic() - started
        with tempfile.TemporaryDirectory() as folder:
            found = measured(case, config, recipe, Path(folder) / "run")
        error = expected / found - 1
        rows.append(
            {
                **asdict(case),
                "model": Path(case.model).name,
                "predicted_bytes": expected,
                "measured_bytes": found,
                "error": error,
                "seconds": seconds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("| model | method | length x batch | recomputed | r, targets | predicted MB | measured MB | error |")
    print("|---|---|---|---|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['model']} | {row['method']} | {row['length']} x {row['batch']} | {row['recompute']} | {row['r']}, "
            f"{row['targets']} | {row['predicted_bytes'] / 1e6:.2f} | {row['measured_bytes'] / 1e6:.2f} "
            f"| {100 * row['error']:+.2f} % |"
        )
    errors = [abs(row["error"]) for row in rows]
    summary = {"runs": len(rows), "worst": max(errors), "median": statistics.median(errors)}
    print(json.dumps({"benchmark": "plan", **summary, "cases": rows, "versions": software_versions()}))


if __name__ == "__main__":
    main()
