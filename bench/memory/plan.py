"""Predicted against measured peaks of training: the planner's, and real runs whose live tensors are counted.

A real run is `nybble.training.train_model` on real tensors: our loop, its batches, clipping, AdamW. Two steps are
trained with a fixed number of recomputed layers; the highest number of live bytes is compared with the peak that the
plan derives from config.json alone. With --data the small real models in its folder models/ are measured as well.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import Option, print_table, run
from bench.models import small_models
from bench.planned import Case, config_of, depth_of, recipe_of
from nybble.data import Example, Groups
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, materialize, meta_model
from nybble.nn.workspace import workspace
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.traced_step import BatchShape, adopt
from nybble.recipe import Recipe, StepMemory
from nybble.run.directory import RunDirectory
from nybble.training import train_model


def predicted(case: Case, config: Any, recipe: Recipe) -> int:
    """The plan's peak of live tensors in two steps, bytes."""
    setting = TracedModel(config, recipe, torch.bfloat16)
    curve = StepAtLevels(setting, BatchShape((case.length,) * case.batch, case.batch * (case.length - 1)))
    return curve.steady(depth_of(case, setting.n_layers)).peak.total_bytes


def measured(case: Case, config: Any, recipe: Recipe, folder: Path) -> int:
    """The peak of live tensors while the real trainer runs, bytes."""
    device = detect_device("cpu")
    workspace.clear()
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
    section = recipe.training.model_copy(update={"output_dir": str(folder)})
    live = MemoryTracer()
    adopt(live, model)
    with live:
        live.start("train")
        train_model(
            model,
            None,
            Groups(rows),
            section,
            run=RunDirectory(folder),
            device=device,
            compute_dtype=torch.bfloat16,
            max_steps=2,
            step_memory=memory,
        )
    workspace.clear()
    return max(peak.total_bytes for peak in live.peaks.values())


def cases(folders: list[str]) -> list[Case]:
    """The grid, without the small models where no folders are given."""
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


def compared(case: Case) -> dict[str, Any]:
    """A case, planned and trained."""
    recipe = recipe_of(case)
    config = config_of(case, recipe)
    began = time.monotonic()
    expected = predicted(case, config, recipe)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        seen = measured(case, config, recipe, Path(folder) / "run")
    figures = {"predicted_bytes": expected, "measured_bytes": seen, "error": expected / seen - 1, "seconds": seconds}
    return {**asdict(case), "model": Path(case.model).name, **figures}


def measure(asked: Namespace) -> dict[str, Any]:
    """The grid."""
    rows: list[dict[str, Any]] = []

    def table() -> Iterator[tuple[object, ...]]:
        grid = [Case("llama-tiny", length=16)] if asked.tiny else cases(small_models(asked.data))
        for case in grid[asked.first : asked.last]:
            row = compared(case)
            rows.append(row)
            yield (
                row["model"], case.method, f"{case.length} x {case.batch}", case.recompute, f"{case.r}, {case.targets}",
                f"{row['predicted_bytes'] / 1e6:.2f}", f"{row['measured_bytes'] / 1e6:.2f}",
                f"{100 * row['error']:+.2f} %",
            )  # fmt: skip

    print_table(
        "model | method | length x batch | recomputed | r, targets | predicted MB | measured MB | error", table()
    )
    errors = [abs(row["error"]) for row in rows]
    return {"runs": len(rows), "worst": max(errors), "median": statistics.median(errors), "cases": rows}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("first", 0, help="the first case"),
        Option("last", 1000, help="the case to stop before"),
        data=None,
    )
