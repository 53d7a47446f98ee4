"""A core of the families that people tune: each trains, its adapter is PEFT's, and it answers."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.bundled import base_path
from tools.families.examine import examine

# One or two of each kind of structure that trains: plain, with windows, biases, fused projections, other norms, ...
CORE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
)
PARTS = ("build", "qlora", "lora", "structure", "peft", "ask")


@pytest.mark.parametrize("family", CORE)
def test_a_family_of_the_core_trains_and_its_adapter_is_pefts(family: str) -> None:
    found: dict[str, Any] = examine(family, base_path(), only=PARTS)
    assert {part: found[part] for part in PARTS} == dict.fromkeys(PARTS, "ok"), found["errors"]
    assert found["flattened"]
    assert found["router"] == []
    assert found["packed_share"] > 0.98
