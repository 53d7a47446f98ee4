"""The model card that accompanies trained weights: the base, the rows, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.reporting.pages import in_markdown
from nybble.units import format_count, format_number, format_share


def model_card(record: Mapping[str, Any]) -> str:
    """The text of README.md for an adapter or model folder, from a run's record."""
    recipe = record["recipe"]
    ledger = record["rows"]["ledger"]
    base_name = recipe["model"]["model_name_or_path"]
    is_local = Path(base_name).expanduser().exists()
    head = ["---", "pipeline_tag: text-generation", "tags:", "- nybble", f"- {recipe['method']}"]
    head += [] if recipe["method"] == "full" else ["library_name: peft"]
    # The hub rejects a card whose base_model is a path.
    head += [] if is_local else [f"base_model: {base_name}"]
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# {recipe['method']} of {in_markdown(Path(base_name).name if is_local else base_name)}",
            "",
            f"Trained with Nybble {record['versions'].get('nybble', '')} on {format_count(ledger['rows_used'])} rows "
            f"({format_count(ledger['tokens_trained'])} learned tokens, rows SHA-256 {record['rows']['sha256'][:16]}).",
            f"Trained parameters: {format_count(record['trainable_parameters'])} of "
            f"{format_count(record['total_parameters'])}.",
            "",
            *_calibrated(record),
            *_measured(record),
            "",
        ]
    )


def _calibrated(record: Mapping[str, Any]) -> list[str]:
    """How to get the base again, where it is not what anybody can download."""
    calibration = record["model"].get("calibration")
    if calibration is None:
        return []
    lora = record["recipe"]["lora"]
    if lora["init_lora_weights"] != "default" or lora["new_tokens"]:
        return ["The base was packed for this adapter alone; it is in the run's folder `base`.", ""]
    return [
        f"The base was packed in 4 bits for {format_count(calibration['rows'])} of the rows; it is in the run's folder "
        "`base`. From the 16-bit base and the same rows it is made again, to the byte on the same kind of processor "
        "with the same number of threads, by:",
        "",
        "    nybble quantize MODEL --recipe RUN/recipe.yaml --out FOLDER",
        "",
    ]


def _measured(record: Mapping[str, Any]) -> list[str]:
    base = record.get("evaluation_base")
    tuned = record.get("evaluation_tuned")
    if not base or not tuned:
        return ["No rows were held out, so nothing was measured."]
    lines = [
        f"On {format_count(tuned['n_rows'])} held-out rows:",
        "",
        "| | base | tuned |",
        "|---|---|---|",
        f"| loss | {format_number(base['loss'])} | {format_number(tuned['loss'])} |",
    ]
    if tuned["exact_match"] is not None:
        lines.append(f"| exact match | {format_share(base['exact_match'])} | {format_share(tuned['exact_match'])} |")
    return lines
