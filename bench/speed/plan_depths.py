"""Whether the depth that a plan chooses is the fastest that fits: every depth of recomputation, measured.

A model of about 160M weights (12 layers, QLoRA on all linears) trains steps of 4 rows of 128 tokens on real tensors at
each of its 13 depths, in turns. For four memory budgets the planner's depth is compared with the fastest of those whose
measured peak is within the budget. Times are processor seconds of one thread, the median over the turns, since other
work on the machine does not count in them. Prints a table and one JSON object last.

    OMP_NUM_THREADS=1 python -m bench.speed.plan_depths [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from bench.memory.plan import Case, recipe_of, shape
from nybble.models import materialize, meta_model
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.traced_step import BatchShape, adopt, batch_of, reusing, run_steps
from nybble.recipe import StepMemory
from nybble.training import software_versions

ROWS = BatchShape((128,) * 4)


def main() -> None:
    """Measure every depth, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    setting = TracedModel(shape("llama-160m"), recipe_of(Case("llama-160m")), torch.bfloat16)
    curve, depths = StepAtLevels(setting, ROWS), range(setting.n_layers + 1)
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    batch = batch_of(model, ROWS)
    materialize(model)
    seconds: list[list[float]] = [[] for _ in depths]
    peaks = [0 for _ in depths]
    for turn in range(asked.turns):
        for depth in depths:
            with reusing():
                live = MemoryTracer()
                adopt(live, model)
                before = time.process_time()
                _, later = run_steps(live, model, batch, depth, setting.dtype)
                seconds[depth].append((time.process_time() - before) / 2)
            peaks[depth] = later.peak.total_bytes
        print(turn, [round(s[-1], 2) for s in seconds], file=sys.stderr, flush=True)
    medians = [statistics.median(s) for s in seconds]
    memory = StepMemory((ROWS.tokens, ROWS.tokens + 1), (curve.peaks, curve.peaks), 0)
    print("| depth | predicted MB | measured MB | seconds a step |")
    print("|---:|---:|---:|---:|")
    for depth in depths:
        print(f"| {depth} | {curve.peaks[depth] / 1e6:.1f} | {peaks[depth] / 1e6:.1f} | {medians[depth]:.3f} |")
    found = []
    print("\n| budget MB | planner's depth | fastest that fits | planner's time over the fastest |")
    print("|---:|---:|---:|---:|")
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(max(peaks[-1], curve.peaks[-1]) + share * (peaks[0] - peaks[-1])) + 100_000
        chosen = memory.level_for(ROWS.tokens, budget)
        fastest = min((d for d in depths if peaks[d] <= budget), key=lambda d: medians[d])
        over = medians[chosen] / medians[fastest] - 1
        found.append({"budget_bytes": budget, "chosen": chosen, "fastest": fastest, "over": over})
        print(f"| {budget / 1e6:.1f} | {chosen} | {fastest} | {100 * over:+.1f} % |")
    content = {"depths": list(zip(curve.peaks, peaks, medians, strict=True)), "budgets": found}
    print(json.dumps({"benchmark": "plan_depths", **content, "versions": software_versions()}))


if __name__ == "__main__":
    main()
