"""What quantizing costs: files measured against the adapter on its base, on the rows that were held out, and a card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nybble.data import fixed_clock
from nybble.exporting.importance import SMALL
from nybble.exporting.merging import Compared
from nybble.exporting.verify import Limits, Reference
from nybble.hardware import detect_device
from nybble.models import Artifact, load_artifact
from nybble.recipe import Recipe
from nybble.training import stop_at
from nybble.units import format_bytes, format_number

_FIGURES = ("mean_kl", "worst_kl", "loss", "loss_reference", "n_rows", "n_positions", "greedy_equal", "n_prompts")


def quantized_figures(
    tuned: Artifact,
    recipe: Recipe,
    compared: Compared,
    folder: Path,
    files: Sequence[dict[str, Any]],
    plain: Mapping[str, tuple[Path, list[dict[str, Any]]]],
    *,
    in_llama_cpp: bool = False,
) -> None:
    """Add to each of `files` its figures on the rows, and those of the same file without an importance matrix.

    The reference is what was trained: the adapter on its base; of a whole model that model. The files' tensors, as the
    `gguf` package decodes them, are run by stock transformers; `in_llama_cpp` the files by llama.cpp as well.
    """
    device = detect_device(recipe.model.device)
    with (
        fixed_clock(tuned.clock),
        Reference(compared.rows, recipe.evaluation.max_new_tokens, tuned.stop_tokens) as reference,
    ):
        model, tokenizer, dtype = load_artifact(tuned, device)
        stop_at(model, tuned.stop_tokens)
        reference.capture(model, tokenizer, dtype)
        del model
        for one in files:
            tensors = one.pop("tensors")
            one["rows"] = compared.kind
            one["held_out"] = _measure(reference, folder, Path(one["gguf"]), tensors)
            beside = plain.get(one["type"])
            one["without_importance"] = _measure(reference, folder, *beside) if beside else None
            if in_llama_cpp:
                one["llama_cpp"] = reference.measure_llama_cpp(Path(one["gguf"]), one["held_out"])


def _measure(reference: Reference, folder: Path, file: Path, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    from nybble.exporting.stock_gguf import write_decoded

    # In float32, or as a large model is run anyway.
    is_small = sum(one.stat().st_size for one in folder.glob("*.safetensors")) <= SMALL
    dtype = torch.float32 if is_small else torch.bfloat16
    with tempfile.TemporaryDirectory(prefix="nybble-decoded-") as scratch:
        write_decoded(str(folder), str(file), tensors, Path(scratch), dtype)
        figures = reference.measure(Path(scratch), "gguf", Limits(), "cpu").to_json()
    return {name: figures[name] for name in _FIGURES}


def quantized_card(name: str, rows: str, files: Sequence[Mapping[str, Any]]) -> str:
    """A page beside the files: their sizes, and what each costs on the rows."""
    first = files[0]["held_out"]
    lines = [
        f"# {name}, quantized for llama.cpp",
        "",
        f"Measured on {first['n_rows']} {rows} rows ({first['n_positions']} positions) against the model as it was "
        f"trained, whose loss there is {format_number(first['loss_reference'])}. An importance matrix says how much an "
        "error in each column of a weight matters; it comes from the rows that were trained on.",
        "",
        "| type | size | mean KL | loss | mean KL without importance matrix | greedy answers equal |",
        "|---|---|---|---|---|---|",
    ]
    for one in files:
        held, plain = one["held_out"], one["without_importance"]
        beside = format_number(plain["mean_kl"], 5) if plain else "–"
        lines.append(
            f"| {one['type']} | {format_bytes(one['file_bytes'])} | {format_number(held['mean_kl'], 5)} "
            f"| {format_number(held['loss'])} | {beside} | {held['greedy_equal']} of {held['n_prompts']} |"
        )
    fallbacks = [line for one in files for line in one["fallbacks"]]
    return "\n".join([*lines, *(["", *fallbacks] if fallbacks else []), ""])
