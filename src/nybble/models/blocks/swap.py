"""Putting our blocks into a model, and the report of what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nybble.models.blocks.proof import decide
from nybble.models.skeleton import base_of
from nybble.models.small import choice_for
from nybble.recipe import ModelSection


def implementation_of(section: ModelSection, config: Any) -> str | None:
    """What transformers is asked for; None: what the class of the model has, `sdpa` or `eager`."""
    return choice_for(config) if section.attn_implementation == "auto" else section.attn_implementation


@dataclass(frozen=True)
class SwapReport:
    """The parts of a model that run through our blocks."""

    flattened: bool  # rows follow each other in one sequence; else they are padded
    blocks: dict[str, int] = field(default_factory=dict)  # kind -> how many
    trees: bool = True  # whether such rows may be trees of contexts; else each of their paths is a row
    reason: str | None = None  # why not all of it does, for people


def swap_blocks(model: Any, attention: str = "auto", whole: Any = None) -> SwapReport:
    """Put our blocks into a causal language model that transformers built; `blocks_of` returns the report later.

    Args:
        model: is changed in place; it may be on the meta device.
        attention: the recipe's `attn_implementation`; `eager` and `flash_attention_2` are transformers' own, padded.
        whole: the config that decides, where `model` has only some of its layers.
    """
    if attention in ("eager", "flash_attention_2"):
        report = SwapReport(False, reason=f"attn_implementation {attention}: rows are padded")
    else:
        decision = decide(type(model), whole or model.config)
        reasons = [*([] if decision.flattened else ["rows are padded"]), *decision.reasons]
        report = SwapReport(decision.flattened, decision.put_in(model), decision.trees, "; ".join(reasons) or None)
    model.nybble_blocks = report
    return report


def blocks_of(model: Any) -> SwapReport:
    """The report of `swap_blocks` for `model`, which may be bare or have adapters."""
    base = base_of(model)
    return getattr(base, "nybble_blocks", SwapReport(False))
