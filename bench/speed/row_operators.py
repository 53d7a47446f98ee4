"""Speed of the row operators on a CPU: the native path beside plain torch, at the size of the tutorial's average batch.

Sides are alternated within one run on one thread, so results often lie in memory that was not there before. Taken are
medians of wall time, and of the processor's time, which other work on a shared machine disturbs less. Prints a table
and one JSON object last.

    python -m bench.speed.row_operators [--rows 1715] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from nybble.hardware import detect_device
from nybble.kernels import cpu, cpu_rows, plain_rows
from nybble.training import software_versions

Calls = dict[str, Callable[[Any], object]]


def calls(rows: int) -> Calls:
    """Operator and width -> a call of it on a path; bfloat16."""
    x, y = torch.randn(2, rows, 1024, dtype=torch.bfloat16)
    gate, up, grad = torch.randn(3, rows, 2816, dtype=torch.bfloat16)
    logits = 3 * torch.randn(1024, 32_000, dtype=torch.bfloat16)
    labels, angles = torch.randint(0, 32_000, (1024,)), torch.randn(rows, 64, dtype=torch.bfloat16)
    weight, rstd, out = y[0], torch.rand(rows), torch.empty_like(x)
    return {
        f"rms_norm {rows} x 1024": lambda path: path.rms_norm(x, weight, 1e-6, False),
        f"rms_norm_backward {rows} x 1024": lambda path: path.rms_norm_backward(y, x, weight, rstd, False),
        f"rope {rows} x 16 x 64": lambda path: path.rope(x.view(rows, 16, 64), angles, angles, False),
        f"dropout {rows} x 1024": lambda path: path.dropout(x, 0.1, 1, out),
        f"dropout_add_ {rows} x 1024": lambda path: path.dropout_add_(out, x, 0.1, 1),
        f"gated silu {rows} x 2816": lambda path: path.gated(gate, up, "silu"),
        f"gated_backward_ silu {rows} x 2816": lambda path: path.gated_backward_(grad, gate, up, "silu"),
        "cross_entropy_ 1024 x 32000": lambda path: path.cross_entropy_(logits, labels, 0.0),
        "cross_entropy_ capped 1024 x 32000": lambda path: path.cross_entropy_(logits, labels, 30.0),
    }


def measured(call: Callable[[Any], object], repeats: int) -> dict[str, dict[str, float]]:
    """Path -> median seconds of a call, one of each in turn; the first round is not counted."""
    paths = (cpu_rows, plain_rows)
    taken: dict[str, list[tuple[float, float]]] = {path.NAME: [] for path in paths}
    for _ in range(repeats + 1):
        for path in paths:
            wall, busy = time.perf_counter(), time.thread_time()
            call(path)
            taken[path.NAME].append((time.perf_counter() - wall, time.thread_time() - busy))
    return {
        name: {"wall_seconds": median(t[0] for t in times[1:]), "processor_seconds": median(t[1] for t in times[1:])}
        for name, times in taken.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1715)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'operator':<40} {'native ms':>10} {'torch ms':>10} {'ratio':>6}   processor's time, one thread")
    operators = {}
    for name, call in calls(arguments.rows).items():
        operators[name] = measured(call, arguments.repeats)
        ours, theirs = (1e3 * operators[name][side]["processor_seconds"] for side in (cpu_rows.NAME, plain_rows.NAME))
        print(f"{name:<40} {ours:>10.2f} {theirs:>10.2f} {theirs / ours:>6.1f}")
    result = {
        "operators": operators,
        "threads": 1,
        "instruction_set": cpu.instruction_set(),
        "device": detect_device().name,
        "versions": software_versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
