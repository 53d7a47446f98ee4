"""What merging costs: loss and KL against the adapter as trained, for every target, and for PEFT's own 4-bit merge.

Real small models on real rows, after a short run (small adapters) and a longer one (large adapters), over bases packed
by each encoder. PEFT's merge runs in stock transformers + bitsandbytes over the same packed base: decode, add, round to
4 bits again. All are measured by `nybble.exporting.verify` in fresh processes.
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nybble
from bench.harness import Option, print_table, run
from nybble.bundled import base_path, heldout_rows_path, recipe_path, train_rows_path
from nybble.data import prepare_rows
from nybble.exporting import Limits, Reference
from nybble.hardware import detect_device
from nybble.models import find_artifact, load_artifact
from nybble.recipe import load_recipe
from nybble.training import stop_at

ENCODERS = ("absmax", "search", "calibrated")
LENGTHS = {
    "short": {"max_steps": 20, "learning_rate": 2e-4},
    "long": {"max_steps": 200, "learning_rate": 3e-3},
    "tiny": {"max_steps": 2, "learning_rate": 2e-4, "max_train_rows": 40},
}
UNLIMITED = Limits(mean_kl=1e9, loss_gap=1e9)


def cases(data: Path, wanted: Sequence[str], lengths: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each training, without encoder."""
    found: list[tuple[str, dict[str, Any]]] = []
    if "demo" in wanted:
        own = {
            "model_name_or_path": str(base_path()),
            "dataset_name": str(train_rows_path()),
            "eval_dataset_name": str(heldout_rows_path()),
        }
        found.append(("demo", own))
    pairs = (("stories260K", "alpaca_style_1100.json"), ("TinyStories-656K", "guanaco-llama2-1k.parquet"))
    for model, rows in (pair for pair in pairs if pair[0] in wanted):
        for length in lengths:
            common = {"max_length": 256, "per_device_train_batch_size": 16, "n_samples": 0, "max_new_tokens": 24}
            files = {"model_name_or_path": data / "models" / model, "dataset_name": data / "rows" / rows}
            found.append((f"{model}, {length}", {**common, **LENGTHS[length], **{k: str(v) for k, v in files.items()}}))
    return found


def peft_merge(run: Path, folder: Path) -> Path:
    """The run's adapter merged by PEFT into bitsandbytes' 4-bit weights."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = load_recipe(run / "recipe.yaml")
    base = run / "base"
    if not base.is_dir():
        base = folder / "packed"
        nybble.quantize(recipe.model.model_name_or_path, base, {"encoder": recipe.quantization.encoder})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"})
    merged = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload()
    merged._weight_conversions = []  # transformers 5.23 cannot undo what it did on reading; the keys are the file's own
    merged.save_pretrained(folder / "peft")
    AutoTokenizer.from_pretrained(run / "adapter").save_pretrained(folder / "peft")
    return folder / "peft"


def measure_peft(run: Path, folder: Path) -> dict[str, Any]:
    """PEFT's own merge, measured as ours are."""
    tuned, device = find_artifact(str(run)), detect_device("cpu")
    recipe = load_recipe(run / "recipe.yaml")
    model, tokenizer, dtype = load_artifact(tuned, device)
    stop_at(model, tuned.stop_tokens)
    rows = prepare_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed).held_out
    with Reference(rows, 24, tuned.stop_tokens) as reference:
        reference.capture(model, tokenizer, dtype)
        return reference.measure(peft_merge(run, folder), "peft", UNLIMITED, "cpu").to_json()


def one(name: str, settings: dict[str, Any], encoder: str, folder: Path) -> dict[str, Any]:
    """One training and all its merges."""
    run = folder / "run"
    recipe = recipe_path() if name == "demo" else None
    where = {"output_dir": str(run), "encoder": encoder, "device": "cpu", "report_to": "none"}
    record = nybble.train(load_recipe(recipe, {**settings, **where}))
    assert record.evaluation_base is not None
    merges = nybble.merge(run, folder / "auto", limits=UNLIMITED)["candidates"]
    merges += nybble.merge(run, folder / "4bit", into="4bit", limits=UNLIMITED)["candidates"]
    merges.append(measure_peft(run, folder))
    return {
        "case": name,
        "encoder": encoder,
        "loss_untrained": record.evaluation_base.loss,
        "loss_trained": record.eval_loss,
        "merges": merges,
    }


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every case over a base of every encoder."""
    results: list[dict[str, Any]] = []

    def table() -> Iterator[tuple[str, ...]]:
        for name, settings in cases(asked.data, asked.cases, asked.lengths):
            for encoder in asked.encoders:
                with tempfile.TemporaryDirectory() as folder:
                    result = one(name, settings, encoder, Path(folder))
                results.append(result)
                Path(asked.partial).write_text(json.dumps(results))  # an hour's work should survive an interruption
                for m in result["merges"]:
                    yield (
                        name, encoder, f"{m['loss_reference']:.4f}", m["target"], f"{m['loss_gap']:+.4f}",
                        f"{m['mean_kl']:.5f}", f"{m['worst_kl']:.4f}",
                    )  # fmt: skip

    print_table("case | encoder | as trained | merged into | loss against it | mean KL | worst KL", table())
    return results


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("cases", ("demo", "stories260K", "TinyStories-656K"), tiny=("stories260K",)),
        Option("encoders", ENCODERS, tiny=ENCODERS[:1]),
        Option("lengths", ("short", "long"), tiny=("tiny",), help="of the runs on real models"),
        Option("partial", os.devnull, help="file for the results so far"),
        data=True,
    )
