"""Packing a sharded checkpoint of Llama-2-7B's shape with `nybble quantize`: seconds and peak host memory.

Random bfloat16 weights are written, a shard a layer. The verb runs in a process of its own, whose anonymous memory is
sampled. Then `nybble.models.load_model` runs twice, the second time from the cache. 32 layers need 19 GB in FOLDER; all
is removed again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from bench.harness import Option, run, watch
from bench.models import SEVEN_B_HIDDEN, write_seven_b

LOAD = """
import sys, time
started = time.monotonic()
from nybble.hardware import detect_device
from nybble.models import find_model, load_model
from nybble.recipe import load_recipe
recipe = load_recipe(None, {"model_name_or_path": sys.argv[1], "encoder": sys.argv[2], "device": "cpu"})
load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
print(time.monotonic() - started)
"""


def measure(asked: Namespace) -> dict[str, Any]:
    """Write, pack, load twice."""
    with tempfile.TemporaryDirectory(dir=asked.folder or None) as name:
        folder = Path(name)
        model, packed = str(folder / "model"), str(folder / "packed")
        file_bytes = write_seven_b(Path(model), asked.hidden, asked.layers)
        environment = {**os.environ, "NYBBLE_CACHE": str(folder / "cache")}
        words = ["quantize", model, "--out", packed, "--encoder", asked.encoder, "--json", "--device", "cpu"]
        output, spent = watch([sys.executable, "-m", "nybble", *words, "--no-cache"], environment)
        load = [sys.executable, "-c", LOAD, model, asked.encoder]
        starts = [float(watch(load, environment)[0]) for _ in range(2)]
    written = json.loads(output)
    found = {
        "source_bytes": file_bytes,
        "packed_file_bytes": written["file_bytes"],
        "packed_linear_bytes": written["packed_bytes"],
        "peak_bytes": spent["peak_bytes"],
        "beyond_packed_bytes": spent["peak_bytes"] - written["file_bytes"],
        "quantize_seconds": spent["seconds"],
        "load_seconds": starts[0],
        "load_seconds_from_cache": starts[1],
    }
    for figure, value in found.items():
        print(f"{figure:<24} {value:,}")
    return found


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("hidden", SEVEN_B_HIDDEN, tiny=256),
        Option("layers", 32, tiny=1),
        Option("encoder", "search", tiny="absmax"),
        Option("folder", "", help="where to write; default: the system's temporary folder"),
    )
