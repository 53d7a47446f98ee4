"""QLoRA, LoRA and full training on real small models and real rows, several seeds each, by `nybble compare`.

    python -m bench.quality.comparison --data ../shared/data [--steps 174] [--seeds 3] [--folder runs/bench-comparison]

Two trained Llamas (stories260K, TinyStories-656K) on guanaco-llama2-1k and on 1,100 alpaca rows. With a folder an
interrupted measurement goes on where it was. Prints a Markdown table, the verdicts and one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import nybble
from nybble.hardware import detect_device
from nybble.training import software_versions

MODELS = ("stories260K", "TinyStories-656K")
ROWS = ("guanaco-llama2-1k.parquet", "alpaca_style_1100.json")


def one(arguments: argparse.Namespace, model: str, rows: str, folder: Path) -> dict[str, Any]:
    """One comparison and its figures."""
    settings = {
        "model_name_or_path": str(arguments.data / "models" / model),
        "dataset_name": str(arguments.data / "rows" / rows),
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "max_steps": arguments.steps,
        "learning_rate": 2e-3,
        "n_samples": 2,
        "device": "cpu",
    }
    methods = [word.strip() for word in arguments.methods.split(",")]
    found = nybble.compare(
        [], settings, methods=methods, seeds=arguments.seeds, out=folder / f"{model}-{Path(rows).stem}"
    )
    return {"model": model, "rows": rows, **found.to_json()}


def table(results: list[dict[str, Any]]) -> list[str]:
    """A line an arm."""
    lines = [
        "| model | rows | arm | learning rate | held-out loss | 95 % interval | less lora | peak, MB | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for arm in result["arms"]:
            if not arm["measured"]:
                continue
            span, apart = arm["eval_loss_interval"], difference(result, arm["name"], "lora")
            interval = f"{span['low']:.4f} – {span['high']:.4f}" if span else "–"
            rates = ", ".join(dict.fromkeys(f"{rate:g}" for rate in arm["learning_rates"]))
            lines.append(
                f"| {result['model']} | {Path(result['rows']).stem} | {arm['name']} | {rates} | {arm['eval_loss']:.4f} "
                f"| {interval} | {apart} | {arm['peak_bytes'] / 1e6:,.0f} | {arm['tokens_per_second']:,.0f} |"
            )
    return lines


def difference(result: dict[str, Any], a: str, b: str) -> str:
    """Arm `a` less arm `b` over the same rows, with its interval."""
    for found in result["differences"]:
        if {found["a"], found["b"]} == {a, b}:
            sign = 1 if found["a"] == a else -1
            low, high = sorted(sign * found["loss"][end] for end in ("low", "high"))
            return f"{sign * found['loss']['value']:+.4f} ({low:+.4f} to {high:+.4f})"
    return "–"


def main() -> None:
    """Run all four and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and rows/")
    parser.add_argument("--folder", type=Path, help="where the comparisons go, to be looked at or gone on with")
    parser.add_argument("--steps", type=int, default=174)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="qlora,lora,full", help="full=probe probes its rate")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results = [one(arguments, model, rows, folder) for model in arguments.models for rows in arguments.rows]
    print("\n".join(table(results)))
    for result in results:
        print(f"\n{result['model']}, {result['rows']}: {result['verdict']}")
    device = detect_device("cpu").name
    print(json.dumps({"results": results, "device": device, "versions": software_versions()}))


if __name__ == "__main__":
    main()
