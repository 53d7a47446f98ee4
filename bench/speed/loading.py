"""Packing a sharded checkpoint of Llama-2-7B's shape with `nybble quantize`: peak host memory and seconds.

    python -m bench.speed.loading [--layers 32] [--encoder search] [--folder FOLDER]

Writes random bfloat16 weights, a shard a layer, then runs the verb in a process of its own and samples that process's
anonymous memory (pages of the files that the kernel maps are not its own). Then `nybble.models.load_model` twice, the
second time from the cache. Prints one JSON object last. FOLDER needs 19 GB for 32 layers; it is removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from nybble.hardware import detect_device
from nybble.training import software_versions

HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
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


def write_checkpoint(folder: Path, layers: int) -> int:
    """Random weights of the shape; bytes written."""
    folder.mkdir()
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=32,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    ).save_pretrained(folder)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    places: dict[str, str] = {}
    for index in range(layers + 1):
        name = f"model.layers.{index}."
        tensors = (
            {
                **{f"{name}self_attn.{p}_proj.weight": normal(HIDDEN, HIDDEN) for p in "qkvo"},
                **{f"{name}mlp.{p}_proj.weight": normal(MLP, HIDDEN) for p in ("gate", "up")},
                f"{name}mlp.down_proj.weight": normal(HIDDEN, MLP),
                f"{name}input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
                f"{name}post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
            if index < layers
            else {
                "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
                "lm_head.weight": normal(VOCABULARY, HIDDEN),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        )
        shard = f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run_watched(command: list[str], environment: dict[str, str]) -> tuple[str, float, int]:
    """Output, seconds and peak anonymous bytes of a process."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))])
            time.sleep(0.005)
        assert process.stdout is not None
        output = process.stdout.read()
        assert process.returncode == 0, command
    return output, time.monotonic() - started, peak


def measure(folder: Path, layers: int, encoder: str) -> dict[str, Any]:
    """Write, pack, load twice."""
    file_bytes = write_checkpoint(folder / "model", layers)
    environment = {**os.environ, "NYBBLE_CACHE": str(folder / "cache")}
    words = ["quantize", str(folder / "model"), "--out", str(folder / "packed"), "--encoder", encoder, "--json"]
    nybble = [sys.executable, "-m", "nybble", *words, "--device", "cpu", "--no-cache"]
    output, seconds, peak = run_watched(nybble, environment)
    done = json.loads(output)
    load = [sys.executable, "-c", LOAD, str(folder / "model"), encoder]
    starts = [float(run_watched(load, environment)[0]) for _ in range(2)]
    return {
        "layers": layers,
        "encoder": encoder,
        "source_bytes": file_bytes,
        "packed_file_bytes": done["file_bytes"],
        "packed_linear_bytes": done["packed_bytes"],
        "peak_bytes": peak,
        "beyond_packed_bytes": peak - done["file_bytes"],
        "quantize_seconds": seconds,
        "load_seconds": starts[0],
        "load_seconds_from_cache": starts[1],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--encoder", default="search")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.layers, arguments.encoder)
    result |= {"device": detect_device("cpu").name, "versions": software_versions()}
    for name, value in result.items():
        print(f"{name:<24} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
