"""Greedy generation from 4-bit weights on a CPU: ours beside transformers + bitsandbytes, from one and the same folder.

    python -m bench.speed.generate [--hidden 2048] [--layers 8] [--tokens 32] [--prompt 64] [--repeats 5] [--threads 1]
        [--rank 0]

A Llama of random weights is packed by `nybble quantize`; both sides load that folder and generate alternately in one
process; above rank 0 each with adapters on all linears, ours and PEFT's. First-token time is the whole of the prompt;
the rest is tokens a second after it. Medians of wall time and of one thread's processor time, which leaves out what
else the machine did. One JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nybble
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model
from nybble.recipe import LoraSection, load_recipe
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


def adapted(model: Any, rank: int, is_ours: bool) -> Any:
    """With fresh adapters on all linears but the head, in evaluation mode."""
    if not rank:
        return model
    if is_ours:
        return attach(model, LoraSection(r=rank, lora_alpha=2 * rank), "base").eval()
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).eval()


class _Clock:
    """Wall and processor seconds of the prompt and of each token, as generate calls it."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def put(self, _value: Any) -> None:
        self.at.append((time.perf_counter(), time.thread_time()))

    def end(self) -> None:
        """Nothing is left."""


def generate(model: Any, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    """First-token seconds, and tokens a second after it."""
    clock = _Clock()
    with torch.no_grad():
        clock.put(None)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    (start, start_cpu), _prompt, (first, first_cpu), *_, (last, last_cpu) = clock.at
    return {
        "first_token_seconds": first - start,
        "tokens_per_second": (tokens - 1) / (last - first),
        "first_token_cpu_seconds": first_cpu - start_cpu,
        "tokens_per_cpu_second": (tokens - 1) / (last_cpu - first_cpu),
    }


def measure(packed: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of each side."""
    recipe = load_recipe(None, {"model_name_or_path": str(packed), "device": "cpu"})
    ours, _ = load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, device_map={"": "cpu"}).eval()
    ids = torch.randint(3, 32000, (1, arguments.prompt))
    sides = {
        "nybble": adapted(ours, arguments.rank, True),
        "transformers + bitsandbytes": adapted(theirs, arguments.rank, False),
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.repeats + 1):  # the first round is not counted
        for name, model in sides.items():
            taken[name].append(generate(model, ids, arguments.tokens))
    figures = taken["nybble"][0]
    return {name: {f: median(run[f] for run in runs[1:]) for f in figures} for name, runs in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"hidden": 2048, "layers": 8, "tokens": 32, "prompt": 64, "repeats": 5, "rank": 0}
    for name, default in (*defaults.items(), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        sides = measure(write_packed(Path(folder), arguments.hidden, arguments.layers), arguments)
    for name, side in sides.items():
        print(f"{name:<30}", ", ".join(f"{figure} {value:.3f}" for figure, value in side.items()))
    a, b = sides.values()
    ratios = {
        "speedup": a["tokens_per_second"] / b["tokens_per_second"],
        "first_token_speedup": b["first_token_seconds"] / a["first_token_seconds"],
        "cpu_speedup": a["tokens_per_cpu_second"] / b["tokens_per_cpu_second"],
        "first_token_cpu_speedup": b["first_token_cpu_seconds"] / a["first_token_cpu_seconds"],
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    about = {"device": detect_device("cpu").name, "load": os.getloadavg()[0], "versions": software_versions()}
    print(json.dumps({**vars(arguments), "sides": sides, **ratios, **about}))


if __name__ == "__main__":
    main()
