"""Greedy generation from 4-bit weights on a CPU: ours beside transformers + bitsandbytes, from one and the same folder.

    python bench/generate.py [--hidden 2048] [--layers 8] [--tokens 32] [--prompt 64] [--repeats 5] [--threads 1]

A Llama of random weights is packed by `nybble quantize`; both sides load that folder and generate alternately in one
process. First-token time is the whole of the prompt; the rest is tokens a second after it. One JSON object last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nybble
from nybble.hardware import detect_device
from nybble.models import find_model, load_model
from nybble.recipe import load_recipe
from nybble.training import software_versions


def write_packed(folder: Path, hidden: int, layers: int) -> Path:
    """A packed Llama of random weights with a placeholder for a tokenizer."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_attention_heads=hidden // 64,
        num_hidden_layers=layers,
        vocab_size=32000,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "plain")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "plain")
    nybble.quantize(str(folder / "plain"), folder / "packed", {"encoder": "absmax", "cache": "false"})
    return folder / "packed"


class _Clock:
    """Seconds of the prompt and of each token, as generate calls it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""


def generate(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """First-token seconds, and tokens a second after it."""
    clock = _Clock()
    with torch.no_grad():
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    return clock.at[1] - started, (tokens - 1) / (clock.at[-1] - clock.at[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 2048), ("layers", 8), ("tokens", 32), ("prompt", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        packed = write_packed(Path(folder), arguments.hidden, arguments.layers)
        recipe = load_recipe(None, {"model_name_or_path": str(packed), "device": "cpu"})
        ours, _ = load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
        theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, device_map={"": "cpu"}).eval()
        ids = torch.randint(3, 32000, (1, arguments.prompt))
        sides = {"nybble": ours, "transformers + bitsandbytes": theirs}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(arguments.repeats + 1):  # the first round is not counted
            for name, model in sides.items():
                taken[name].append(generate(model, ids, arguments.tokens))
    result: dict[str, Any] = {**vars(arguments), "sides": {}}
    for name, runs in taken.items():
        first, speed = (median(values) for values in zip(*runs[1:], strict=True))
        result["sides"][name] = {"first_token_seconds": first, "tokens_per_second": speed}
        print(f"{name:<30} first token {first:.3f} s, then {speed:.2f} tokens/s")
    a, b = result["sides"].values()
    result["speedup"] = a["tokens_per_second"] / b["tokens_per_second"]
    result["first_token_speedup"] = b["first_token_seconds"] / a["first_token_seconds"]
    print(f"speedup {result['speedup']:.2f}, of the first token {result['first_token_speedup']:.2f}")
    print(json.dumps(result | {"device": detect_device("cpu").name, "versions": software_versions()}))


if __name__ == "__main__":
    main()
