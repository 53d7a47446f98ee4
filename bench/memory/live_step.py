"""Live tensors of one training step at Llama-2-7B's shape, batch 4, r = 8 on q and v with dropout 0.1.

All 32 layers are run on tensors without data, forward, backward and update, and every storage is counted while it is
alive; nothing is extrapolated and no weights are needed. Where all layers are recomputed, also down the savers below.
Prints a table, the largest tensors at each peak with --tensors, and one JSON object last. About half a minute a case.

    python -m bench.memory.live_step [--tensors]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nybble.models import MEMORY_SAVERS, MemorySavers, materialize, meta_model
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.shapes import config_of
from nybble.planning.traced_step import BatchShape, adopt, batch_of, reusing, run_steps
from nybble.recipe import load_recipe
from nybble.training import software_versions

LAYERS = 32
LEVELS = tuple(tuple(MEMORY_SAVERS)[:n] for n in range(len(MEMORY_SAVERS) + 1))
CASES = (
    ((512,) * 4, LAYERS, ()),
    *(((1024,) * 4, LAYERS, names) for names in LEVELS),
    *(((2048,) * 4, LAYERS, names) for names in LEVELS),
    ((429, 429, 429, 428), 0, ()),
)


def main() -> None:
    """Trace and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", action="store_true", help="list the largest tensors at each peak")
    asked = parser.parse_args()
    recipe = load_recipe(None, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "q_proj,v_proj"})
    found = []
    print(
        "| tokens | recomputed | savers | peak GB | first step GB | weights | activations | on the host | highest in |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|---|")
    for lengths, depth, names in CASES:
        started = time.monotonic()
        model = meta_model(config_of("llama-2-7b"), recipe, torch.bfloat16)
        batch = batch_of(model, BatchShape(lengths))
        with FakeTensorMode(), reusing():
            materialize(model)
            savers = MemorySavers(model)
            savers.apply(names)
            live = MemoryTracer(detailed=asked.tensors)
            adopt(live, model, savers)
            first, later = run_steps(live, model, batch, depth, torch.bfloat16, savers=savers)
        section, peak = max(later.peaks.items(), key=lambda item: item[1].total_bytes)
        print(
            f"| {sum(lengths):,} | {depth} of {LAYERS} | {', '.join(names) or '–'} | {peak.total_bytes / 1e9:.3f} "
            f"| {first.peak.total_bytes / 1e9:.3f} | {peak.parts['weights'] / 1e9:.3f} "
            f"| {peak.parts['activations'] / 1e9:.3f} | {later.host_bytes / 1e9:.2f} | {section} |",
            flush=True,
        )
        for (n_bytes, origin), n in Counter(peak.tensors).most_common() if asked.tensors else ():
            print(f"    {n:3} x {n_bytes / 1e6:8.1f} MB  {origin}")
        parts = {
            "tokens": sum(lengths),
            "recomputed": depth,
            "savers": names,
            "peak_bytes": peak.total_bytes,
            "parts": peak.parts,
        }
        found.append(
            {
                **parts,
                "host_bytes": later.host_bytes,
                "first_step_bytes": first.peak.total_bytes,
                "seconds": time.monotonic() - started,
            }
        )
    print(json.dumps({"benchmark": "memory", "shape": "llama-2-7b", "cases": found, "versions": software_versions()}))


if __name__ == "__main__":
    main()
