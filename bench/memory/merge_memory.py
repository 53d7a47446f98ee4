"""Merging a checkpoint of Llama-2-7B's shape (random weights, r=16 on all linears): memory, and time against disk.

    python -m bench.memory.merge_memory [--layers 32] [--folder FOLDER]

The streamed merge runs in a process of its own, once into the original and once into the base as bitsandbytes would
have packed it (encoded and decoded on the way); its anonymous memory is sampled. A plain copy of the same files says
what the disk allows. Verification is not part of it: that takes whatever memory the model takes to run, and reads from
disk what does not fit. FOLDER needs 28 GB for 32 layers; it is removed again. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.speed.loading import run_watched, write_checkpoint
from nybble.hardware import detect_device
from nybble.training import software_versions

RANK = 16
MERGE = """
import sys, torch
from pathlib import Path
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.models import BaseWeights, find_model
from nybble.recipe import load_recipe
model, adapter, out, target = sys.argv[1:]
recipe = load_recipe(None, {"model_name_or_path": model, "encoder": "absmax", "cache": "false"})
packing = (recipe.quantization, torch.bfloat16) if target == "dequantized" else ()
Path(out).mkdir()
with BaseWeights(find_model(recipe.model), *packing) as base, AdapterDelta(Path(adapter)) as delta:
    write_merged(base, delta, Path(out), torch.bfloat16)
"""


def write_adapter(model: Path, folder: Path) -> None:
    """Random factors for every linear of the decoder layers."""
    folder.mkdir()
    factors = {}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                shape = file.get_slice(name).get_shape()
                if "_proj" in name:
                    prefix = f"base_model.model.{name.removesuffix('.weight')}"
                    factors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.01
                    factors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.01
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copy_seconds(model: Path, out: Path) -> float:
    """Reading and writing the same bytes, as the merge does: no sync at the end of either."""
    started = time.monotonic()
    shutil.copytree(model, out)
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"layers": arguments.layers, "rank": RANK, "merges": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        result["source_bytes"] = write_checkpoint(folder / "model", arguments.layers)
        write_adapter(folder / "model", folder / "adapter")
        for target in ("original", "dequantized"):
            words = [str(folder / part) for part in ("model", "adapter", "out")]
            _out, seconds, peak = run_watched([sys.executable, "-c", MERGE, *words, target], dict(os.environ))
            written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
            result["merges"][target] = {"seconds": seconds, "peak_bytes": peak, "written_bytes": written}
            print(target, result["merges"][target], flush=True)
            shutil.rmtree(folder / "out")
        result["copy_seconds"] = copy_seconds(folder / "model", folder / "out")
        print("copy", result["copy_seconds"], flush=True)
    print(json.dumps(result | {"device": detect_device("cpu").name, "versions": software_versions()}))


if __name__ == "__main__":
    main()
