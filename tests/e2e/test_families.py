"""Families that people tune: each trains in 4 bits on our step, its router left alone, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.bundled import base_path
from tools.families import families
from tools.families.examine import examine
from tools.families.page import page

# One or two of each kind of structure.
CORE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
PARTS = ("build", "qlora", "structure", "ask")
RESULT = sorted((Path(__file__).parents[2] / "bench" / "results").glob("families-*.json"))[-1]


def recorded() -> dict[str, dict[str, Any]]:
    """What the sweep found, by family."""
    return {row["family"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["families"]}


@pytest.mark.parametrize("family", CORE)
def test_a_family_of_the_core_trains_on_our_step(family: str) -> None:
    found = examine(family, base_path(), only=PARTS)
    assert {part: found[part] for part in PARTS} == dict.fromkeys(PARTS, "ok"), found["errors"]
    assert found["flattened"]
    assert found["router"] == []
    assert found["packed_share"] > 0.98


@pytest.mark.nightly
@pytest.mark.parametrize("family", sorted({*recorded(), *families()}))
def test_what_the_sweep_recorded_still_works(family: str) -> None:
    """A family that is not in the record, such as a new one, must at least be built."""
    worked = {name for name, value in recorded().get(family, {"build": "ok"}).items() if value == "ok"}
    found = examine(family, base_path(), only={*worked, *(("qlora", "lora") if worked - {"build", "stock"} else ())})
    assert {part: found[part] for part in worked} == dict.fromkeys(worked, "ok"), found["errors"]


def test_the_page_tells_what_was_found(tmp_path: Path) -> None:
    told = json.loads(RESULT.read_text(encoding="utf-8"))
    told["families"] = [
        {
            "family": "good",
            "errors": {},
            "qlora": "ok",
            "flattened": True,
            "packed_share": 0.5,
            "router": [],
            "ask": "ok",
        },
        {"family": "bad", "errors": {"stock": "no", "qlora": "fell | over /tmp/x/y"}, "qlora": "FAULT"},
    ]
    told["without"] = ["merge"]
    file = tmp_path / "families-here.json"
    file.write_text(json.dumps(told))
    text = page(file)
    assert "| train by QLoRA | 1 of 2 |" in text
    assert "| end as a fault of ours | 1 |" in text
    assert "| merged, verified, and equal in stock transformers | not asked |" in text
    assert "| good | ok | - | ours | 50.0% | ok | - | - | - | ok | - |  |" in text
    assert "| bad | FAULT | - | - | - | - | - | - | - | - | - | fell \\| over y |" in text
