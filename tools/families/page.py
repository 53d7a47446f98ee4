"""Writes docs/evidence/families.md of a result of the sweep; `docs/generate.py` calls `page`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """# Families

What Nybble makes of a tiny random model of each family of transformers {transformers}, as
`python -m tools.families.sweep` found it on {date} (Nybble at {commit}; {n} of the {n_all} families that the tool can
build, those that are most used first; the others were not run). A tiny model has the structure of the family's
checkpoints: every kind of layer, 4 experts of which 2 answer; `cond:` is before multimodal checkpoints, whose language
model is trained, `#` before a second shape of a family. Training is three steps with adapters on all linears.

| | |
|---|---|
| train by QLoRA | {qlora} of {n} |
| train by LoRA on a 16-bit base | {lora} |
| with our attention and loss, rows one after another | {flattened} |
| stock PEFT loads the adapter, logits equal | {peft} |
| merged, verified, and equal in stock transformers | {merge} |
| GGUF, verified | {gguf} |
| `ask` answers | {ask} |
| train in transformers + PEFT + bitsandbytes | {stock} |
| end as a fault of ours | {faults} |

`ok`: done, and equal where something is compared; `refused`: one line that says why; `FAULT`: an error of no documented
kind; `differs`: done, and the numbers are not equal; `-`: not reached, or not asked{left_out}.
*packed* is the share of the decoder's matrices in 4 bits; *router* is ok where no linear that chooses experts is packed
or adapted.

| family | QLoRA | LoRA | step | packed | router | PEFT | merge | GGUF | ask | stock | first error |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
COUNTED = ("qlora", "lora", "peft", "merge", "gguf", "ask", "stock")


def page(result: Path) -> str:
    """The page of a result: `{"date", "commit", "transformers", "n_all", "without", "families": [...]}`."""
    told = json.loads(result.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = told["families"]
    counts: dict[str, Any] = {part: sum(row.get(part) == "ok" for row in rows) for part in COUNTED}
    counts["flattened"] = sum(bool(row.get("flattened")) for row in rows)
    counts["faults"] = sum(any(row.get(part) == "FAULT" for part in COUNTED if part != "stock") for row in rows)
    told_of = {name: told[name] for name in ("date", "commit", "transformers", "n_all")}
    without = told["without"]
    left_out = f" (this run was without {', '.join(without)})" if without else ""
    counts |= dict.fromkeys(without, "not asked")
    head = HEAD.format(n=len(rows), left_out=left_out, **told_of, **counts)
    ordered = sorted(rows, key=lambda row: str(row["family"]))
    return head + "".join(f"| {' | '.join(_cells(row))} |\n" for row in ordered)


def _cells(row: dict[str, Any]) -> list[str]:
    share = row.get("packed_share")
    trained = row.get("qlora") == "ok" and share is not None
    errors = [text for part, text in row["errors"].items() if part != "stock"]
    return [
        row["family"],
        *(row.get(part) or "-" for part in ("qlora", "lora")),
        ("ours" if row.get("flattened") else "theirs") if trained else "-",
        f"{share:.1%}" if trained else "-",
        ("; ".join(row["router"]) or "ok") if trained else "-",
        *(row.get(part) or "-" for part in ("peft", "merge", "gguf", "ask", "stock")),
        _short(row.get("stopped") or (errors[0] if errors else "")),
    ]


def _short(text: str) -> str:
    """One cell: folders of the run are left out."""
    words = [word.rpartition("/")[2] if word.startswith("/tmp/") else word for word in text.split()]  # noqa: S108
    return " ".join(words).replace("|", "\\|")[:140]
