"""What each encoder costs in quality: error of weights, divergence of predictions, loss after fine-tuning.

    python -m bench.quality.encoders damage --data FOLDER       seconds
    python -m bench.quality.encoders finetune --data FOLDER     about an hour on one core

`damage`: relative RMS error on synthetic weights; then, on trained models, mean KL to the float32 model and change of
loss on held-out TinyStories text (pieces of 1,200 characters; calibration sees every other piece). `finetune`: held-out
loss after the same steps on alpaca rows, QLoRA with each encoder beside 16-bit LoRA, paired over seeds and learning
rates.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nybble
from bench.harness import Option, print_table, run
from bench.models import SMALL_MODELS
from nybble.hardware import detect_device
from nybble.models import attach, calibrate, find_model, load_model
from nybble.quant import decode, encode, encode_searched
from nybble.recipe import load_recipe

ARMS: dict[str, dict[str, Any]] = {
    "absmax": {"encoder": "absmax"},
    "search, unsigned": {"encoder": "search", "signed_scales": False},
    "search": {"encoder": "search"},
    "calibrated": {"encoder": "calibrated"},
    "search + loftq": {"encoder": "search", "init_lora_weights": "loftq", "r": 8},
    "calibrated + qera": {"encoder": "calibrated", "init_lora_weights": "qera", "r": 8},
}
RATES = (5e-4, 2e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)


def weight_errors() -> dict[str, dict[str, float]]:
    """Relative RMS error on a million synthetic weights, blocks of 64, double quantization."""
    torch.manual_seed(0)
    student = torch.distributions.StudentT(torch.tensor(5.0))
    weights = {"N(0,1)": torch.randn(1024, 1024), "t, df=5": student.sample((1024, 1024))}
    encoders = {"absmax": encode, "search": encode_searched}
    return {
        name: {e: float((decode(f(w), torch.float32) - w).norm() / w.norm()) for e, f in encoders.items()}
        for name, w in weights.items()
    }


def pieces(data: Path, folder: Path) -> tuple[list[list[int]], Tensor]:
    """Token ids to calibrate on and, from other pieces of the text, to measure on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (data / "text" / "tinystories_197k.txt").read_text()
    rows = [tokenizer(text[i : i + 1200]).input_ids for i in range(0, len(text) - 1199, 1200)]
    shortest = min(512, *map(len, rows))
    return [row[:shortest] for row in rows[::2]], torch.tensor([row[:shortest] for row in rows[1::2]])


@torch.no_grad()
def predictions(model: Any, windows: Tensor) -> Tensor:
    """Log probabilities, `(rows, tokens, vocabulary) float32`."""
    return torch.cat([torch.log_softmax(model(part).logits.float(), -1) for part in windows.split(8)])


def damage(data: Path, name: str) -> dict[str, dict[str, float]]:
    """Divergence and change of loss under each arm."""
    folder = data / "models" / name
    rows, windows = pieces(data, folder)
    exact = predictions(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), windows)

    def loss(p: Tensor) -> float:
        return float(-p[:, :-1].gather(-1, windows[:, 1:, None]).mean())

    found = {}
    for arm, settings in ARMS.items():
        recipe = load_recipe(
            None, {"model_name_or_path": str(folder), "bnb_4bit_compute_dtype": "float32", "device": "cpu", **settings}
        )
        source = find_model(recipe.model)
        model, _ = load_model(source, "qlora", recipe.model, recipe.quantization, detect_device("cpu"))
        if "calibrated" in arm or "+" in arm:
            done = calibrate(model, source, rows, recipe.quantization, recipe.lora, lambda *_: None)
            model = attach(model, recipe.lora, "base", done.starts).eval() if done.starts else model
        packed = predictions(model, windows)
        found[arm] = {"kl": float((exact.exp() * (exact - packed)).sum(-1).mean()), "loss": loss(packed) - loss(exact)}
    return found


def finetune(asked: Namespace, model: str, arm: dict[str, Any], rate: float, seed: int) -> float:
    """Held-out loss after the steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model_name_or_path": str(asked.data / "models" / model),
            "dataset_name": str(asked.data / "rows" / "alpaca_style_1100.json"),
            "output_dir": f"{folder}/run",
            "max_length": 256,
            "per_device_train_batch_size": 8,
            "max_steps": asked.steps,
            "learning_rate": rate,
            "seed": seed,
            "r": 8,
            "lora_alpha": 16,
            "n_samples": 0,
            "eval_fraction": 0.1,
            "report_to": "none",
            "device": "cpu",
            **arm,
        }
        return float(nybble.train(load_recipe(None, settings)).eval_loss or 0.0)


def finetune_all(asked: Namespace) -> list[dict[str, Any]]:
    """Every model, arm, rate and seed."""
    arms = {"16-bit LoRA": {"method": "lora"}, **{a: s for a, s in ARMS.items() if "unsigned" not in a}}
    arms = dict(list(arms.items())[: asked.arms])
    rates = RATES[: 1 if asked.tiny else None]
    results = []
    for model, (arm, settings), rate in itertools.product(asked.models, arms.items(), rates):
        losses = [finetune(asked, model, settings, rate, seed) for seed in SEEDS[: asked.seeds]]
        results.append({"model": model, "arm": arm, "learning_rate": rate, "losses": losses})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def print_finetune(results: list[dict[str, Any]], models: tuple[str, ...]) -> None:
    """Mean held-out loss, and the difference from 16-bit LoRA paired over seeds with its standard error."""
    for model in models:
        rows = {(r["arm"], r["learning_rate"]): r["losses"] for r in results if r["model"] == model}
        rates = tuple(dict.fromkeys(rate for _, rate in rows))

        def cell(losses: list[float], lora: list[float]) -> str:
            pairs = [a - b for a, b in zip(losses, lora, strict=True)]
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            return f"{statistics.mean(losses):.4f} ({statistics.mean(pairs):+.4f} ± {error:.4f})"

        print_table(
            f"{model} | {' | '.join(f'lr {rate:g}' for rate in rates)}",
            (
                (arm, *(cell(rows[arm, rate], rows["16-bit LoRA", rate]) for rate in rates))
                for arm in dict.fromkeys(name for name, _ in rows)
            ),
        )


def measure(asked: Namespace) -> dict[str, Any]:
    """One of the two parts."""
    torch.set_num_threads(1)
    if asked.part == "finetune":
        results = finetune_all(asked)
        print_finetune(results, asked.models)
        return {"finetune": results}
    errors = weight_errors()
    print(json.dumps(errors, indent=1))
    models = {name: damage(asked.data, name) for name in asked.models}
    print_table(
        f"encoder | {' | '.join(f'KL {name} | loss' for name in models)}",
        ((a, *(f"{m[a]['kl']:.4f} | {m[a]['loss']:+.4f}" for m in models.values())) for a in ARMS),
    )
    return {"weight_errors": errors, "models": models}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("models", SMALL_MODELS, tiny=SMALL_MODELS[:1]),
        Option("steps", 100, tiny=2, help="finetune"),
        Option("seeds", len(SEEDS), tiny=2, help="finetune"),
        Option("arms", len(ARMS), tiny=2, help="finetune: the first N, 16-bit LoRA first"),
        parts=("damage", "finetune"),
        data=True,
    )
