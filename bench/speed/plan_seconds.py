"""Predicted against measured time of a step, on the rates that this machine was measured to have.

A step (forward, backward, clipping, AdamW) on real tensors, in processor seconds of one thread, since other work on the
machine does not count in them: set OMP_NUM_THREADS=1. With --data the small real models are measured as well.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import Option, print_table, run, seconds
from bench.models import small_models
from bench.planned import Case, config_of, depth_of, recipe_of
from nybble.hardware import detect_device
from nybble.models import materialize, meta_model
from nybble.planning.devices import measured_profile
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.traced_step import BatchShape, batch_of, stepper


def cases(folders: list[str]) -> list[Case]:
    """Small and large, every method, short and long, both ends of recomputation."""
    base = Case("llama-160m")
    found = [replace(base, length=n, recompute=r) for n in (128, 512) for r in ("none", "all")]
    found += [replace(base, method=method) for method in ("lora", "full")]
    found += [replace(base, targets="q_proj,v_proj", dropout=0.1), replace(base, model="qwen2-160m-wide", batch=1)]
    found += [replace(base, model="gemma3-60m")]
    return found + [Case(folder, length=n, batch=16) for folder in folders for n in (64, 256)]


def measured(setting: TracedModel, rows: BatchShape, depth: int, turns: int) -> float:
    """Seconds of a step; the first, which makes state and kernels, is not counted."""
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    batch = batch_of(model, rows)
    materialize(model)
    step = stepper(model, batch, setting.dtype, depth)
    return seconds({"step": step}, turns)["step"]["processor_seconds"]


def compared(case: Case, profile: Any, turns: int) -> dict[str, Any]:
    """A case, predicted and measured."""
    recipe = recipe_of(case)
    setting = TracedModel(config_of(case, recipe), recipe, torch.bfloat16)
    rows, depth = BatchShape((case.length,) * case.batch), depth_of(case, setting.n_layers)
    work = StepAtLevels(setting, rows).steady(depth)
    return {
        **asdict(case),
        "model": Path(case.model).name,
        "predicted_seconds": profile.seconds(work),
        "measured_seconds": measured(setting, rows, depth, turns),
        "flops": work.flops,
        "moved_bytes": work.moved_bytes,
        "operators": work.operators,
    }


def measure(asked: Namespace) -> dict[str, Any]:
    """Every case."""
    torch.set_num_threads(1)
    profile = measured_profile(detect_device("cpu"), time.process_time)
    found: list[dict[str, Any]] = []

    def table() -> Iterator[tuple[object, ...]]:
        for case in [Case("llama-tiny", length=16)] if asked.tiny else cases(small_models(asked.data)):
            found.append(compared(case, profile, asked.repeats))
            expected, taken = found[-1]["predicted_seconds"], found[-1]["measured_seconds"]
            yield (
                found[-1]["model"], case.method, f"{case.length} x {case.batch}", case.recompute, case.targets,
                f"{expected:.3f}", f"{taken:.3f}", f"{expected / taken:.2f}",
            )  # fmt: skip

    print_table(
        "model | method | length x batch | recomputed | targets | predicted s | measured s | ratio",
        table(),
    )
    ratios = [case["predicted_seconds"] / case["measured_seconds"] for case in found]
    rates = {name: getattr(profile, name) for name in ("flops_per_second", "bytes_per_second", "operator_seconds")}
    return {
        "median_ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        **rates,
        "cases": found,
    }


if __name__ == "__main__":
    run(measure, __doc__, Option("repeats", 5, tiny=1), data=None)
