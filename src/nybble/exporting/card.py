"""The model card of a merged model: the adapter's card, and the figures that merging measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.units import format_number

_INTO = {
    "dequantized": "the decoded 4-bit base that it was trained on",
    "original": "the 16-bit original",
    "4bit-dequantized": "the decoded 4-bit base that it was trained on, and packed again in 4 bits",
    "4bit-original": "the 16-bit original, and packed in 4 bits",
}


def merged_card(adapter_card: Path, result: Mapping[str, Any]) -> str:
    """The text of a merged folder's README.md."""
    text = adapter_card.read_text(encoding="utf-8") if adapter_card.is_file() else "# A merged model\n"
    text = text.replace("library_name: peft\n", "library_name: transformers\n")
    text = re.sub(r"\n## Merged\n.*\Z", "", text, flags=re.DOTALL)
    state = "Verified" if result["verified"] else f"**Not verified** ({'; '.join(result['faults'])})"
    rows = {"trained": "trained (none were held out)"}.get(result["rows"], result["rows"])
    lines = [
        "## Merged",
        "",
        f"The adapter is merged into {_INTO[result['target']]}; {result['dtype']}.",
        f"{state} in a fresh process with stock transformers, on {result['n_rows']} {rows} rows "
        f"({result['n_positions']} positions), against the adapter on its 4-bit base:",
        "",
        "| merged into | mean KL | worst KL | loss | against the adapter | greedy answers equal | answers that stop |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in result["candidates"]:
        name = f"**{c['target']}**" if c["target"] == result["target"] else c["target"]
        lines.append(
            f"| {name} | {format_number(c['mean_kl'], 5)} | {format_number(c['worst_kl'])} "
            f"| {format_number(c['loss'])} | {c['loss_gap']:+.4f} | {c['greedy_equal']} of {c['n_prompts']} "
            f"| {c['stopped']} of {c['n_prompts']} (adapter: {c['stopped_reference']}) |"
        )
    return "\n".join([text.rstrip(), "", *lines, ""])
