"""Greedy generation from 4-bit weights on a CPU: ours beside transformers + bitsandbytes, from one and the same folder.

A Llama of random weights is packed by `nybble quantize`; both sides load that folder and generate in turns in one
process; above rank 0 each with adapters on all linears, ours and PEFT's. First-token time is that of the whole prompt;
the rest is tokens a second after it, by the clock and by one thread's processor, which leaves out other programs.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import nybble
from bench.harness import Figures, Option, medians, print_table, run
from bench.models import VOCABULARY, write_llama
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model
from nybble.recipe import LoraSection, load_recipe


def adapted(model: Any, rank: int, is_ours: bool) -> Any:
    """With fresh adapters on all linears but the head, in evaluation mode."""
    if not rank:
        return model
    if is_ours:
        return attach(model, LoraSection(r=rank, lora_alpha=2 * rank), "base").eval()
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).eval()


class _Clock:
    """Wall and processor seconds of the prompt and of each token, as `generate` calls a streamer."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def put(self, _value: Any) -> None:
        self.at.append((time.perf_counter(), time.thread_time()))

    def end(self) -> None:
        """Nothing is left to write."""


@torch.no_grad()
def generate(model: Any, ids: torch.Tensor, tokens: int) -> Figures:
    """First-token seconds, and tokens a second after it."""
    clock = _Clock()
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
        "first_token_processor_seconds": first_cpu - start_cpu,
        "tokens_per_processor_second": (tokens - 1) / (last_cpu - first_cpu),
    }


def both_sides(packed: Path, asked: Namespace) -> dict[str, Figures]:
    """Medians of each side."""
    recipe = load_recipe(None, {"model_name_or_path": str(packed), "device": "cpu"})
    ours, _ = load_model(find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, device_map={"": "cpu"}).eval()
    ids = torch.randint(3, VOCABULARY, (1, asked.prompt))
    models = {
        "nybble": adapted(ours, asked.rank, True),
        "transformers + bitsandbytes": adapted(theirs, asked.rank, False),
    }
    sides = {name: lambda model=model: generate(model, ids, asked.tokens) for name, model in models.items()}
    return medians(sides, asked.repeats)


def measure(asked: Namespace) -> dict[str, Any]:
    """Both sides, and their ratios."""
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder / "plain", asked.hidden, asked.layers)
        nybble.quantize(str(folder / "plain"), folder / "packed", {"encoder": "absmax", "cache": "false"})
        sides = both_sides(folder / "packed", asked)
    ours, theirs = sides.values()
    ratios = {
        "speedup": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "first_token_speedup": theirs["first_token_seconds"] / ours["first_token_seconds"],
        "processor_speedup": ours["tokens_per_processor_second"] / theirs["tokens_per_processor_second"],
        "first_token_processor_speedup": theirs["first_token_processor_seconds"]
        / ours["first_token_processor_seconds"],
    }
    print_table(
        "side | first token s | tokens/s | tokens per processor second",
        (
            (
                name,
                f"{f['first_token_seconds']:.3f}",
                f"{f['tokens_per_second']:.2f}",
                f"{f['tokens_per_processor_second']:.2f}",
            )
            for name, f in sides.items()
        ),
    )
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    return {"sides": sides, **ratios, "load": os.getloadavg()[0]}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("hidden", 2048, tiny=128),
        Option("layers", 8, tiny=1),
        Option("tokens", 32, tiny=4),
        Option("prompt", 64, tiny=8),
        Option("repeats", 5, tiny=1),
        Option("rank", 0),
        Option("threads", torch.get_num_threads()),
    )
