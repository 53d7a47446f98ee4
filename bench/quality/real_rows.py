"""QLoRA on real small models and real rows: held-out loss before and after, and the same logits in stock PEFT.

Two trained Llamas (stories260K, TinyStories-656K) on guanaco-llama2-1k and on 1,100 alpaca rows, each with r=16 on all
linears.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import nybble
from bench.harness import Option, print_table, run
from bench.models import SMALL_MODELS, SMALL_ROWS
from nybble.hardware import detect_device
from nybble.models import find_model, load_adapter, load_model
from nybble.nn import Linear4bit
from nybble.recipe import Recipe


def stock_difference(run: Path, recipe: Recipe) -> float:
    """Largest difference of logits between our 4-bit model and stock PEFT over the decoded base, in float32."""
    quantization = recipe.quantization.model_copy(update={"bnb_4bit_compute_dtype": "float32"})
    source = find_model(recipe.model)
    ours, _ = load_model(source, "qlora", recipe.model, quantization, detect_device("cpu"))
    stock = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit):
            stock.get_submodule(name).weight.data = module.dequantize()
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        expected = load_adapter(ours, run / "adapter")(ids).logits
        got = PeftModel.from_pretrained(stock, run / "adapter")(ids).logits
    return float((expected - got).abs().max())


def one(asked: Namespace, model: str, rows: str, folder: Path) -> dict[str, Any]:
    """One training and its figures."""
    settings = {
        "model_name_or_path": str(asked.data / "models" / model),
        "dataset_name": str(asked.data / "rows" / rows),
        "output_dir": str(folder / f"{model}-{rows}"),
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "max_steps": asked.steps,
        "learning_rate": 2e-3,
        "n_samples": 0,
        "device": "cpu",
    }
    record = nybble.train(nybble.load_recipe(None, settings))
    assert record.evaluation_base is not None
    assert record.evaluation_tuned is not None
    return {
        "model": model,
        "rows": rows,
        "loss_base": record.evaluation_base.loss,
        "loss_tuned": record.evaluation_tuned.loss,
        "tokens_per_second": record.tokens_per_second,
        "seconds": record.seconds,
        "logit_difference_in_stock_peft": stock_difference(Path(record.run_dir), Recipe.model_validate(record.recipe)),
    }


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every model on all rows."""
    with tempfile.TemporaryDirectory() as folder:
        results = [one(asked, model, rows, Path(folder)) for model in asked.models for rows in asked.rows]
    print_table(
        "model | rows | held-out loss, base | tuned | tokens/s | largest logit difference in stock PEFT",
        (
            (
                r["model"],
                r["rows"],
                f"{r['loss_base']:.4f}",
                f"{r['loss_tuned']:.4f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['logit_difference_in_stock_peft']:.1e}",
            )
            for r in results
        ),
    )
    return results


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("steps", 174, tiny=2),
        Option("models", SMALL_MODELS, tiny=SMALL_MODELS[:1]),
        Option("rows", SMALL_ROWS, tiny=SMALL_ROWS[1:]),
        data=True,
    )
