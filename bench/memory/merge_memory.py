"""Merging a checkpoint of Llama-2-7B's shape (random weights, r=16 on all linears): memory, and time against disk.

The streamed merge runs in a process of its own, once into the original and once into the base as bitsandbytes would
have packed it (encoded and decoded on the way); its anonymous memory is sampled. A plain copy of the same files shows
what the disk allows. Verification is not part of it: that takes whatever memory the model takes to run, and reads from
disk what does not fit. 32 layers need 28 GB in FOLDER; all is removed again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.harness import Option, run, watch
from bench.models import SEVEN_B_HIDDEN, write_seven_b

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


def measure(asked: Namespace) -> dict[str, Any]:
    """Both merges and the copy."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"rank": RANK, "merges": {}}
    with tempfile.TemporaryDirectory(dir=asked.folder or None) as name:
        folder = Path(name)
        result["source_bytes"] = write_seven_b(folder / "model", asked.hidden, asked.layers)
        write_adapter(folder / "model", folder / "adapter")
        for target in ("original", "dequantized"):
            words = [str(folder / part) for part in ("model", "adapter", "out")]
            _output, spent = watch([sys.executable, "-c", MERGE, *words, target])
            written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
            result["merges"][target] = {**spent, "written_bytes": written}
            print(target, result["merges"][target], flush=True)
            shutil.rmtree(folder / "out")
        result["copy_seconds"] = copy_seconds(folder / "model", folder / "out")
        print("copy", result["copy_seconds"], flush=True)
    return result


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("hidden", SEVEN_B_HIDDEN, tiny=256),
        Option("layers", 32, tiny=1),
        Option("folder", "", help="where to write; default: the system's temporary folder"),
    )
