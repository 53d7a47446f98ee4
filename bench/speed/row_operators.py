"""The row operators on one thread of a CPU: native beside plain torch, at the size of the tutorial's average batch.

Results often lie in memory that was not used before, since the sides take turns.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.harness import Option, print_table, run, seconds
from nybble.kernels import library
from nybble.kernels.pointwise import cpu as native
from nybble.kernels.pointwise import torch as reference

Calls = dict[str, Callable[[Any], object]]


def calls(rows: int, vocabulary: int) -> Calls:
    """Operator and width -> a call of it on a backend; bfloat16."""
    x, y = torch.randn(2, rows, 1024, dtype=torch.bfloat16)
    gate, up, grad = torch.randn(3, rows, 2816, dtype=torch.bfloat16)
    logits = 3 * torch.randn(1024, vocabulary, dtype=torch.bfloat16)
    labels, angles = torch.randint(0, vocabulary, (1024,)), torch.randn(rows, 64, dtype=torch.bfloat16)
    weight, rstd, out = y[0], torch.rand(rows), torch.empty_like(x)
    return {
        f"rms_norm {rows} x 1024": lambda path: path.rms_norm(x, weight, 1e-6, False),
        f"rms_norm_backward {rows} x 1024": lambda path: path.rms_norm_backward(y, x, weight, rstd, False),
        f"rope {rows} x 16 x 64": lambda path: path.rope(x.view(rows, 16, 64), angles, angles, False),
        f"dropout {rows} x 1024": lambda path: path.dropout(x, 0.1, 1, out),
        f"dropout_add_ {rows} x 1024": lambda path: path.dropout_add_(out, x, 0.1, 1),
        f"gated silu {rows} x 2816": lambda path: path.gated(gate, up, "silu"),
        f"gated_backward_ silu {rows} x 2816": lambda path: path.gated_backward_(grad, gate, up, "silu"),
        f"cross_entropy_ 1024 x {vocabulary}": lambda path: path.cross_entropy_(logits, labels, 0.0),
        f"cross_entropy_ capped 1024 x {vocabulary}": lambda path: path.cross_entropy_(logits, labels, 30.0),
    }


def measure(asked: Namespace) -> dict[str, Any]:
    """Every operator on both backends."""
    torch.set_num_threads(1)
    operators = {}

    def rows() -> Iterator[tuple[object, ...]]:
        for name, call in calls(asked.rows, asked.vocabulary).items():
            sides = {path.NAME: lambda path=path, call=call: call(path) for path in (native, reference)}
            operators[name] = seconds(sides, asked.repeats)
            ours, theirs = (1e3 * figures["processor_seconds"] for figures in operators[name].values())
            yield name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}"

    print_table("operator | native, processor ms | torch, processor ms | ratio", rows())
    return {"instruction_set": library.instruction_set(), "operators": operators}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("rows", 1715, tiny=32),
        Option("vocabulary", 32_000, tiny=512),
        Option("repeats", 15, tiny=1),
    )
