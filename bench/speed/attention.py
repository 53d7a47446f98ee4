"""Attention over documents on a CPU, forward and backward, backend beside backend, and a product of matrices.

One thread is timed in seconds of its processor, which other programs on the machine do not lengthen; several are timed
by the clock. Floating-point operations are counted for the pairs of tokens that see each other: 2 products forward
and 5 backward.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.harness import Option, print_table, run, seconds
from nybble.kernels import dispatcher
from nybble.kernels.attention.torch import Settings

BATCH = (128, 460, 460, 667)  # tokens of four rows
CASES = (  # documents, heads, kv_heads, width
    (BATCH, 16, 16, 64),
    (BATCH, 32, 8, 128),
    ((64,) * 32, 16, 16, 64),
    ((2048,), 16, 4, 64),
)


def attention(case: tuple[tuple[int, ...], int, int, int], repeats: int) -> dict[str, Any]:
    """Seconds of each backend, and operations a second."""
    lengths, heads, kv_heads, width = case
    tokens = sum(lengths)
    q, k, v, grad = (torch.randn(tokens, n, width).bfloat16() for n in (heads, kv_heads, kv_heads, heads))
    settings, square = Settings(lengths, width**-0.5), torch.randn(1024, 1024).bfloat16()
    sides: dict[str, Callable[[], object]] = {
        backend.NAME: lambda backend=backend: backend.derive((q, k, v), grad, settings)
        for backend in dispatcher.attention(torch.device("cpu"))
        if backend.NAME != "torch"
    }
    clock = "processor_seconds" if torch.get_num_threads() == 1 else "seconds"
    taken = {name: f[clock] for name, f in seconds(sides | {"matmul": lambda: square @ square}, repeats).items()}
    operations = dict.fromkeys(taken, 7 * 2 * width * heads * sum(n * (n + 1) // 2 for n in lengths))
    operations["matmul"] = 2 * 1024**3
    return {
        "threads": torch.get_num_threads(),
        "lengths": lengths,
        "heads": heads,
        "kv_heads": kv_heads,
        "width": width,
        "seconds": taken,
        "operations_per_second": {name: operations[name] / t for name, t in taken.items()},
    }


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every case on one thread, and on all."""
    torch.manual_seed(0)
    found = []
    cases = CASES[: asked.cases]

    def rows() -> Iterator[tuple[object, ...]]:
        for threads in sorted({1, torch.get_num_threads()}):
            torch.set_num_threads(threads)
            for case in cases:
                found.append(attention(case, asked.repeats))
                speeds = found[-1]["operations_per_second"].items()
                lengths, *shape = case
                shown = ", ".join(f"{name} {speed / 1e9:.0f}" for name, speed in speeds)
                yield threads, f"{len(lengths)} of {lengths[0]} to {lengths[-1]}", shape, shown

    print_table("threads | documents | heads, kv heads, width | GFLOP/s", rows())
    return found


if __name__ == "__main__":
    run(measure, __doc__, Option("repeats", 9, tiny=1), Option("cases", len(CASES), tiny=1, help="the first N cases"))
