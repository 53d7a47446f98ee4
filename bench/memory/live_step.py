"""Live tensors of one training step at Llama-2-7B's shape, batch 4, r = 8 on q and v with dropout 0.1.

All 32 layers are run on tensors without data, forward, backward and update, and every storage is counted while it is
alive; nothing is extrapolated and no weights are needed. Where all layers are recomputed, the memory savers below full
recomputation are taken one by one as well. About half a minute a case.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.harness import Option, print_table, run
from nybble.models import MEMORY_SAVERS, MemorySavers, materialize, meta_model
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.shapes import config_of
from nybble.planning.traced_step import BatchShape, adopt, batch_of, reusing, run_steps
from nybble.recipe import load_recipe

LAYERS = 32
LEVELS = tuple(tuple(MEMORY_SAVERS)[:n] for n in range(len(MEMORY_SAVERS) + 1))
CASES = (
    ((512,) * 4, LAYERS, ()),
    *(((1024,) * 4, LAYERS, names) for names in LEVELS),
    *(((2048,) * 4, LAYERS, names) for names in LEVELS),
    ((429, 429, 429, 428), 0, ()),
)


def traced(
    lengths: tuple[int, ...], depth: int, names: tuple[str, ...], detailed: bool
) -> tuple[dict[str, Any], Counter[Any]]:
    """The highest moment of a steady step, and the tensors that were alive then."""
    recipe = load_recipe(None, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "q_proj,v_proj"})
    began = time.monotonic()
    model = meta_model(config_of("llama-2-7b"), recipe, torch.bfloat16)
    batch = batch_of(model, BatchShape(lengths))
    with FakeTensorMode(), reusing():
        materialize(model)
        savers = MemorySavers(model)
        savers.apply(names)
        live = MemoryTracer(detailed=detailed)
        adopt(live, model, savers)
        first, later = run_steps(live, model, batch, depth, torch.bfloat16, savers=savers)
    section, peak = max(later.peaks.items(), key=lambda item: item[1].total_bytes)
    return {
        "tokens": sum(lengths),
        "recomputed": depth,
        "savers": names,
        "peak_bytes": peak.total_bytes,
        "parts": peak.parts,
        "highest_in": section,
        "host_bytes": later.host_bytes,
        "first_step_bytes": first.peak.total_bytes,
        "seconds": time.monotonic() - began,
    }, Counter(peak.tensors)


def measure(asked: Namespace) -> dict[str, Any]:
    """Every case."""
    found: list[dict[str, Any]] = []
    largest: list[Counter[Any]] = []

    def table() -> Iterator[tuple[object, ...]]:
        for lengths, depth, names in [((16,), LAYERS, ())] if asked.tiny else CASES:
            case, tensors = traced(lengths, depth, names, asked.tensors)
            found.append(case)
            largest.append(tensors)
            yield (
                f"{case['tokens']:,}", f"{depth} of {LAYERS}", ", ".join(names) or "–",
                f"{case['peak_bytes'] / 1e9:.3f}", f"{case['first_step_bytes'] / 1e9:.3f}",
                f"{case['parts']['weights'] / 1e9:.3f}", f"{case['parts']['activations'] / 1e9:.3f}",
                f"{case['host_bytes'] / 1e9:.2f}", case["highest_in"],
            )  # fmt: skip

    print_table(
        "tokens | recomputed | savers | peak GB | first step GB | weights | activations | on the host | highest in",
        table(),
    )
    for case, tensors in zip(found, largest, strict=True) if asked.tensors else ():
        print(f"{case['tokens']:,} tokens, {case['recomputed']} layers recomputed:")
        for (n_bytes, origin), n in tensors.most_common():
            print(f"    {n:3} x {n_bytes / 1e6:8.1f} MB  {origin}")
    return {"shape": "llama-2-7b", "cases": found}


if __name__ == "__main__":
    run(measure, __doc__, Option("tensors", False, help="list the largest tensors at each peak"))
