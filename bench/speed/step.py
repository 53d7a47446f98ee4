"""The training step against the stacks people use: tokens a second and peak memory, same rows, settings and weights.

    python -m bench.speed.step --data FOLDER            nybble, a loop by hand, TRL: transformers + PEFT + bitsandbytes
    python -m bench.speed.step --data FOLDER --arms nybble --other CHECKOUT       this version beside another one

A Llama of 168M random weights (hidden 1024, 8 layers, vocabulary 32,000), batches of 4 rows of guanaco-llama2-1k with
the Llama-2 tokenizer, r=8 on q and v, alpha 8, dropout 0.1, max_length 1024; every token is learned, as peers do.
Each arm runs in a process of its own, the arms take turns, and ratios are of medians. Tokens are counted without
padding; time is from the end of the first step to the end of the last; memory is the highest resident memory above that
of a process that has imported torch and transformers. `--suite` grid varies lengths, ranks, targets and method; growth
varies tokens, layers and rank of our own step.
"""

from __future__ import annotations

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.harness import Figures, Option, fresh, medians, print_table, run
from bench.models import VOCABULARY, intermediate_size, write_llama
from bench.speed.step_arms import ARMS, OTHER, Case

GEMM_ROWS = 1715  # tokens of a usual batch


def gemm_rate(hidden: int) -> float:
    """FLOP/s of bfloat16 products of the step's own shape, here and now."""
    import torch

    a, b = torch.randn(GEMM_ROWS, hidden).bfloat16(), torch.randn(intermediate_size(hidden), hidden).bfloat16()
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        a @ b.t()
        best = min(best, time.perf_counter() - started)
    return 2 * a.numel() * b.shape[0] / best


def write_rows(folder: Path, data: Path, n_rows: int) -> Path:
    """The first rows of guanaco."""
    from datasets import load_dataset

    rows = folder / f"rows-{n_rows}.jsonl"
    if not rows.exists():
        table = load_dataset("parquet", data_files=str(data / "rows" / "guanaco-llama2-1k.parquet"))["train"]
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in table.select(range(n_rows))["text"]))
    return rows


def side(case: Case, folder: Path, asked: Namespace) -> Callable[[], Figures]:
    """A case: each call trains it in a new process, and measures the machine's rate first."""
    base = folder / f"base-{case.layers}"
    if not base.exists():
        write_llama(base, asked.hidden, case.layers, asked.data / "tokenizers" / "llama2")
    rows = write_rows(folder, asked.data, case.steps * case.batch)
    environment = {"PYTHONPATH": f"{asked.other}/src"} if case.arm == OTHER else {}

    def train() -> Figures:
        rate = gemm_rate(asked.hidden)
        words = (asdict(case), str(base), str(rows), str(folder))
        figures = fresh("bench.speed.step_arms", "run_arm", *words, environment=environment)
        del figures["versions"]
        return {**figures, "gemm_flops_per_second": rate}

    return train


def suite(name: str, case: Case, arms: tuple[str, ...]) -> list[Case]:
    """The cases of a suite."""
    if name == "main":
        return [replace(case, arm=arm) for arm in arms]
    if name == "grid":
        variants = [
            *(replace(case, max_length=length) for length in (512, 2048)),
            replace(case, r=16, targets="all-linear"),
            replace(case, method="lora"),
        ]
        return [replace(v, arm=arm) for v in variants for arm in ("nybble", "hand")]
    return [
        *(replace(case, batch=batch) for batch in (1, 2, 4, 8)),
        *(replace(case, layers=layers) for layers in (2, 4, 12)),
        *(replace(case, r=r, targets="all-linear") for r in (8, 64, 128)),
        replace(case, recompute="always"),
    ]


def measure(asked: Namespace) -> dict[str, Any]:
    """Every case, in turns. The first is the one that the others are compared with."""
    arms = (*asked.arms, *([OTHER] if asked.other else []))
    cases = suite(asked.suite, Case(steps=asked.steps, layers=asked.layers, batch=asked.batch), arms)
    with tempfile.TemporaryDirectory() as name:
        sides = {str(number): side(case, Path(name), asked) for number, case in enumerate(cases)}
        found = list(medians(sides, asked.repeats, warm_up=False).values())
    rows = [{**asdict(case), **figures} for case, figures in zip(cases, found, strict=True)]
    for row in rows:
        hidden = asked.hidden
        weights = row["layers"] * (4 * hidden**2 + 3 * hidden * intermediate_size(hidden)) + VOCABULARY * hidden
        row["share_of_roofline"] = 4 * weights * row["tokens_per_second"] / row["gemm_flops_per_second"]
    first = rows[0]
    print_table(
        "arm | method | r, targets | length | tokens/s | ours is | peak MB | ours takes | of roofline",
        (
            (
                row["arm"], row["method"], f"{row['r']}, {row['targets']}", row["max_length"],
                f"{row['tokens_per_second']:.0f}", f"{first['tokens_per_second'] / row['tokens_per_second']:.2f}x",
                f"{row['peak_bytes'] / 1e6:.0f}", f"{first['peak_bytes'] / row['peak_bytes']:.2f}x",
                f"{100 * row['share_of_roofline']:.0f} %",
            )
            for row in rows
        ),
    )  # fmt: skip
    return {"cases": rows}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("repeats", 3, tiny=1),
        Option("steps", 5, tiny=2),
        Option("arms", ARMS, help=f"of {', '.join(ARMS)}"),
        Option("suite", "main", help="main, grid or growth"),
        Option("other", "", help="another checkout of nybble, measured as an arm of its own"),
        Option("hidden", 1024, tiny=128),
        Option("layers", 8, tiny=1),
        Option("batch", 4, tiny=1),
        data=True,
    )
