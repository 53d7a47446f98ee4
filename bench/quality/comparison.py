"""QLoRA, LoRA and full training on real small models and real rows, several seeds each, by `nybble compare`.

Two trained Llamas (stories260K, TinyStories-656K) on guanaco-llama2-1k and on 1,100 alpaca rows. With --folder an
interrupted measurement continues where it stopped.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import nybble
from bench.harness import Option, print_table, run
from bench.models import SMALL_MODELS, SMALL_ROWS

HEADS = "model | rows | arm | learning rate | held-out loss | 95 % interval | less lora | peak, MB | tokens/s"


def one(asked: Namespace, model: str, rows: str, folder: Path) -> dict[str, Any]:
    """One comparison and its figures."""
    settings = {
        "model_name_or_path": str(asked.data / "models" / model),
        "dataset_name": str(asked.data / "rows" / rows),
        "max_length": asked.max_length,
        "per_device_train_batch_size": 16,
        "max_steps": asked.steps,
        "learning_rate": 2e-3,
        "n_samples": 2,
        "device": "cpu",
    }
    if asked.max_rows:
        settings["max_train_rows"] = asked.max_rows
    out = folder / f"{model}-{Path(rows).stem}"
    found = nybble.compare([], settings, methods=list(asked.methods), seeds=asked.seeds, out=out)
    return {"model": model, "rows": rows, **found.to_json()}


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each arm that was measured."""
    found = []
    for arm in result["arms"]:
        if not arm["measured"]:
            continue
        span = arm["eval_loss_interval"]
        rates = ", ".join(dict.fromkeys(f"{rate:g}" for rate in arm["learning_rates"]))
        found.append(
            (
                result["model"],
                Path(result["rows"]).stem,
                arm["name"],
                rates,
                f"{arm['eval_loss']:.4f}",
                f"{span['low']:.4f} – {span['high']:.4f}" if span else "–",
                difference(result, arm["name"], "lora"),
                f"{arm['peak_bytes'] / 1000000.0:,.0f}",
                f"{arm['tokens_per_second']:,.0f}",
            )
        )
    return found


def difference(result: dict[str, Any], a: str, b: str) -> str:
    """Arm `a` less arm `b` over the same rows, with its interval."""
    for found in result["differences"]:
        if {found["a"], found["b"]} == {a, b}:
            sign = 1 if found["a"] == a else -1
            low, high = sorted(sign * found["loss"][end] for end in ("low", "high"))
            return f"{sign * found['loss']['value']:+.4f} ({low:+.4f} to {high:+.4f})"
    return "–"


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every model on all rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary)
        results = [one(asked, model, rows, folder) for model in asked.models for rows in asked.rows]
    print_table(HEADS, (line for result in results for line in lines(result)))
    for result in results:
        print(f"\n{result['model']}, {result['rows']}: {result['verdict']}")
    return results


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("folder", "", help="where the comparisons are written, to be looked at or continued"),
        Option("steps", 174, tiny=2),
        Option("seeds", 3, tiny=1),
        Option("methods", ("qlora", "lora", "full"), tiny=("qlora", "lora"), help="full=probe probes its rate"),
        Option("models", SMALL_MODELS, tiny=SMALL_MODELS[:1]),
        Option("rows", SMALL_ROWS, tiny=SMALL_ROWS[1:]),
        Option("max_length", 256, tiny=64),
        Option("max_rows", 0, tiny=40, help="training rows; 0: all"),
        data=True,
    )
