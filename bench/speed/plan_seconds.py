"""Predicted against measured time of a step, on this machine's own measured rates.

A step (forward, backward, clipping, AdamW) on real tensors, the median of several in processor seconds of one thread,
since other work on the machine does not count in them. Prints a table and one JSON object last.

    OMP_NUM_THREADS=1 python -m bench.speed.plan_seconds [--models DIR ...] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.memory.plan import Case, depth_of, recipe_of, shape
from nybble.hardware import detect_device
from nybble.models import find_model, materialize, meta_model
from nybble.planning.devices import measured_profile
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.traced_step import BatchShape, batch_of, stepper
from nybble.training import software_versions


def cases(folders: list[str]) -> list[Case]:
    """Small and large, every method, short and long, both ends of recomputation."""
    base = Case("llama-160m")
    found = [replace(base, length=n, recompute=r) for n in (128, 512) for r in ("none", "all")]
    found += [replace(base, method=method) for method in ("lora", "full")]
    found += [replace(base, targets="q_proj,v_proj", dropout=0.1), replace(base, model="qwen2-160m-wide", batch=1)]
    found += [replace(base, model="gemma3-60m")]
    return found + [Case(folder, length=n, batch=16) for folder in folders for n in (64, 256)]


def measured(setting: TracedModel, rows: BatchShape, depth: int, turns: int) -> float:
    """Seconds of a step."""
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    batch = batch_of(model, rows)
    materialize(model)
    step = stepper(model, batch, setting.dtype, depth)
    taken = []
    for _ in range(turns + 1):
        before = time.process_time()
        step()
        taken.append(time.process_time() - before)
    return statistics.median(taken[1:])  # the first makes state and kernels


def main() -> None:
    """Predict, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    profile = measured_profile(detect_device("cpu"), time.process_time)
    rates = {name: getattr(profile, name) for name in ("flops_per_second", "bytes_per_second", "operator_seconds")}
    print(rates, file=sys.stderr)
    print("| model | method | length x batch | recomputed | targets | predicted s | measured s | predicted/measured |")
    print("|---|---|---|---|---|---:|---:|---:|")
    found = []
    for case in cases(asked.models):
        recipe = recipe_of(case)
        config = find_model(recipe.model).config if Path(case.model).is_dir() else shape(case.model)
        setting = TracedModel(config, recipe, torch.bfloat16)
        rows, depth = BatchShape((case.length,) * case.batch), depth_of(case, setting.n_layers)
        work = StepAtLevels(setting, rows).steady(depth)
        expected, seconds = profile.seconds(work), measured(setting, rows, depth, asked.turns)
        name = Path(case.model).name
        found.append({**asdict(case), "model": name, "predicted_seconds": expected, "measured_seconds": seconds})
        found[-1] |= {"flops": work.flops, "moved_bytes": work.moved_bytes, "operators": work.operators}
        print(
            f"| {name} | {case.method} | {case.length} x {case.batch} | {case.recompute} | {case.targets} "
            f"| {expected:.3f} | {seconds:.3f} | {expected / seconds:.2f} |",
            flush=True,
        )
    ratios = [case["predicted_seconds"] / case["measured_seconds"] for case in found]
    summary = {"median_ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    content = {**summary, **rates, "cases": found, "versions": software_versions()}
    print(json.dumps({"benchmark": "plan_seconds", **content}))


if __name__ == "__main__":
    main()
