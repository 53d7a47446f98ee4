"""Whether the depth that a plan chooses is the fastest that fits: every depth of recomputation, measured.

A model of about 160M weights (12 layers, QLoRA on all linears) trains steps of 4 rows of 128 tokens on real tensors at
each of its 13 depths, in turns. For four memory budgets the planner's depth is compared with the fastest of those whose
measured peak is within the budget. Times are processor seconds of one thread, since other work on the machine does not
count in them: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

import torch

from bench.harness import Figures, Option, medians, print_table, run
from bench.planned import Case, recipe_of, shape
from nybble.models import materialize, meta_model
from nybble.planning.extrapolate import StepAtLevels, TracedModel
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.traced_step import BatchShape, adopt, batch_of, reusing, run_steps
from nybble.recipe import StepMemory

ROWS = BatchShape((128,) * 4)
SHARES = (0.0, 0.3, 0.6, 1.0)  # of what lies between the peaks of full recomputation and of none


def measure(asked: Namespace) -> dict[str, Any]:
    """Every depth, then the choices."""
    torch.set_num_threads(1)
    setting = TracedModel(shape(asked.shape), recipe_of(Case(asked.shape)), torch.bfloat16)
    curve = StepAtLevels(setting, ROWS)
    model = meta_model(setting.config, setting.recipe, setting.dtype)
    batch = batch_of(model, ROWS)
    materialize(model)

    def steps(depth: int) -> Figures:
        with reusing():
            live = MemoryTracer()
            adopt(live, model)
            before = time.process_time()
            _, later = run_steps(live, model, batch, depth, setting.dtype)
            return {"seconds": (time.process_time() - before) / 2, "peak_bytes": later.peak.total_bytes}

    sides = {str(depth): lambda depth=depth: steps(depth) for depth in range(setting.n_layers + 1)}
    measured = list(medians(sides, asked.repeats, warm_up=False).values())
    print_table(
        "depth | predicted MB | measured MB | seconds a step",
        (
            (depth, f"{curve.peaks[depth] / 1e6:.1f}", f"{f['peak_bytes'] / 1e6:.1f}", f"{f['seconds']:.3f}")
            for depth, f in enumerate(measured)
        ),
    )
    budgets = choices(curve, measured)
    print_table(
        "budget MB | planner's depth | fastest that fits | planner's time over the fastest",
        ((f"{b['budget_bytes'] / 1e6:.1f}", b["chosen"], b["fastest"], f"{100 * b['over']:+.1f} %") for b in budgets),
    )
    return {"predicted_bytes": curve.peaks, "depths": measured, "budgets": budgets}


def choices(curve: StepAtLevels, measured: list[Figures]) -> list[dict[str, Any]]:
    """For each budget the planner's depth and the fastest that fits."""
    memory = StepMemory((ROWS.tokens, ROWS.tokens + 1), (curve.peaks, curve.peaks), 0)
    peaks = [figures["peak_bytes"] for figures in measured]
    found = []
    for share in SHARES:
        budget = int(max(peaks[-1], curve.peaks[-1]) + share * (peaks[0] - peaks[-1])) + 100_000
        chosen = memory.level_for(ROWS.tokens, budget)
        fitting = [depth for depth, peak in enumerate(peaks) if peak <= budget]
        fastest = min(fitting, key=lambda depth: measured[depth]["seconds"])
        over = measured[chosen]["seconds"] / measured[fastest]["seconds"] - 1
        found.append({"budget_bytes": budget, "chosen": chosen, "fastest": fastest, "over": over})
    return found


if __name__ == "__main__":
    run(measure, __doc__, Option("shape", "llama-160m", tiny="llama-tiny"), Option("repeats", 5, tiny=1))
