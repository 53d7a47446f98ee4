"""Peak host memory of packing a sharded checkpoint while it is read.

Writes a Llama of a few 7B-sized layers (random, bfloat16, shards of 0.5 GB) to a temporary folder, loads it with the
4-bit plug-in in a fresh process, and compares the peak of anonymous memory (pages of the files that the kernel maps are
not ours) with the packed model. Prints one JSON object last.

    python bench/loading.py [--layers 6]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.hardware import detect_device
from nybble.models import find_model, load_model
from nybble.recipe import load_recipe
from nybble.training import software_versions


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load(folder: str) -> dict[str, float]:
    """Load and pack; memory is sampled every 2 ms."""
    recipe = load_recipe(None, {"model_name_or_path": folder, "device": "cpu"})
    source, device = find_model(recipe.model), detect_device("cpu")
    torch.ones(8, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
    bare, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    model, report = load_model(source, "qlora", recipe.model, recipe.quantization, device)
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    model_bytes = sum(
        t.numel() * t.element_size() for t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values()
    )
    largest = max(m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)) * 2
    return {
        "bare_bytes": bare,
        "peak_bytes": peak[0],
        "model_bytes": model_bytes,
        "packed_bytes": report.packed_bytes,
        "largest_tensor_bytes": largest,
        "beyond_model_bytes": peak[0] - bare - model_bytes,
        "seconds": seconds,
    }


def main() -> None:
    """Write the checkpoint, measure in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--load", help="internal: the folder to load in this process")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
        config = LlamaConfig(num_hidden_layers=arguments.layers, **shape)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
        disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        done = subprocess.run([sys.executable, __file__, "--load", folder], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1]) | {"file_bytes": disk, "layers": arguments.layers}
    result |= {"device": detect_device("cpu").name, "versions": software_versions()}
    for name, value in result.items():
        print(f"{name:<22} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
