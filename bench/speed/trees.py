"""A step over a conversation whose template drops the reasoning of earlier answers: one tree beside separate rows.

Each answer has a context of its own, since the template renders what came before without its reasoning. As rows, every
context holds the history again; as a tree, a prefix that contexts share occurs once. Forward and backward of an adapter
on a 4-bit Llama of random weights, one thread, each side in a process of its own; memory is that of the step, above the
model's. The losses are compared.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.harness import Option, ResidentPeak, fresh, medians, print_table, run, timed
from bench.models import VOCABULARY, write_llama
from nybble.data import IGNORED, FlatBatch
from nybble.data.batches import Group
from nybble.data.tree import merge_contexts, unfold
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model
from nybble.recipe import load_recipe

SIDES = ("tree", "rows")


def conversation(n_answers: int, system: int, question: int, reasoning: int, answer: int) -> dict[str, Any]:
    """A tree of so many answers; the others are numbers of tokens."""
    random = Random(n_answers)

    def words(n: int) -> list[int]:
        return [random.randrange(3, VOCABULARY) for _ in range(n)]

    history = words(system)
    contexts = []
    for _ in range(n_answers):
        prompt, thought, said = history + words(question), words(reasoning), words(answer)
        contexts.append((prompt + thought + said, [IGNORED] * len(prompt) + thought + said))
        history = prompt + said
    ids, labels, segments = merge_contexts(contexts)
    return {"input_ids": ids, "labels": labels, "segments": segments}


def step(base: str, side: str, asked: dict[str, int], repeats: int) -> dict[str, float]:
    """What a step of one side takes, in this process."""
    torch.set_num_threads(1)
    values = {"model_name_or_path": base, "target_modules": "all-linear", "device": "cpu", "lora_dropout": 0}
    recipe = load_recipe(None, values)
    model, loaded = load_model(
        find_model(recipe.model), "qlora", recipe.model, recipe.quantization, detect_device("cpu")
    )
    model = attach(model, recipe.lora, "base").train()
    tree = conversation(**asked)
    rows = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in unfold(tree["input_ids"], tree["labels"], tree["segments"])
    ]
    group: Group = [tree] if side == "tree" else rows
    batch = FlatBatch()([group])
    loss = 0.0

    def once() -> None:
        nonlocal loss
        with torch.autocast("cpu", getattr(torch, loaded.compute_dtype), enabled=loaded.compute_dtype != "float32"):
            found = model(**batch, num_items_in_batch=len(batch["targets"])).loss
        found.backward()
        model.zero_grad()
        loss = found.item()

    peak = ResidentPeak()
    once()
    peak_bytes = peak.read()
    taken = medians({side: timed(once)}, repeats, warm_up=False, quiet=True)[side]
    return {
        "tokens": sum(len(row["input_ids"]) for row in group),
        "learned": len(batch["targets"]),
        "loss": loss,
        "peak_bytes": peak_bytes,
        **taken,
    }


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every number of answers."""
    found: list[dict[str, Any]] = []
    sizes = {name: getattr(asked, name) for name in ("system", "question", "reasoning", "answer")}

    def table(base: Path) -> Iterator[tuple[object, ...]]:
        for n_answers in map(int, asked.answers):
            case = {"n_answers": n_answers, **sizes}
            sides = {side: fresh("bench.speed.trees", "step", base, side, case, asked.repeats) for side in SIDES}
            found.append({**case, "sides": sides})
            tree, rows = sides.values()
            for name in ("tokens", "processor_seconds", "peak_bytes"):
                found[-1][f"{name}_ratio"] = tree[name] / rows[name]
            yield (
                n_answers,
                f"{tree['tokens']:,} of {rows['tokens']:,}",
                f"{tree['processor_seconds']:.2f} s of {rows['processor_seconds']:.2f} s",
                f"{tree['peak_bytes'] / 1e6:.0f} MB of {rows['peak_bytes'] / 1e6:.0f} MB",
                f"{abs(tree['loss'] - rows['loss']):.1e}",
            )

    with tempfile.TemporaryDirectory() as folder:
        base = write_llama(Path(folder) / "base", asked.hidden, asked.layers)
        print_table("answers | tokens | processor | memory | losses apart", table(base))
    return found


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("answers", ("2", "4", "8"), tiny=("2",)),
        Option("system", 200, tiny=5, help="tokens of the system text"),
        Option("question", 60, tiny=5, help="tokens of a question"),
        Option("reasoning", 300, tiny=9, help="tokens of an answer's reasoning"),
        Option("answer", 120, tiny=5, help="tokens of an answer without it"),
        Option("hidden", 512, tiny=128),
        Option("layers", 4, tiny=1),
        Option("repeats", 3, tiny=1),
    )
