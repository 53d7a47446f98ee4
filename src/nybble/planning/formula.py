"""What a step takes where its model cannot be traced: textbook counts, good to perhaps a quarter.

Kept for a layer and token: the inputs of its products, 6 hidden + 2 intermediate numbers; of a recomputed layer its
input; logits of the learned tokens three times in float32, since such a model computes its loss itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.planning.memory_tracer import PARTS, Peak
from nybble.planning.traced_step import BatchShape, StepCost

if TYPE_CHECKING:
    from nybble.planning.extrapolate import TracedModel


class Formula:
    """As `nybble.planning.extrapolate.StepAtLevels`, by counting."""

    def __init__(self, setting: TracedModel, rows: BatchShape) -> None:
        self.setting, self.rows = setting, rows
        self.peaks = tuple(self.steady(depth).peak.total_bytes for depth in range(setting.n_layers + 1))

    def first(self, depth: int) -> StepCost:
        """The first step; as later ones."""
        return self.steady(depth)

    def steady(self, depth: int) -> StepCost:
        """A step, the first `depth` layers recomputed."""
        text, n, tokens = self.setting.config.get_text_config(), self.setting.n_layers, self.rows.tokens
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        layer = 2 * tokens * (6 * text.hidden_size + 2 * inner)
        parts = static_parts(self.setting)
        parts["gradients"] = 4 * self.setting.parameters[0]
        parts["optimizer"] = 8 * self.setting.parameters[0]
        parts["activations"] = (n - depth) * layer + depth * 2 * tokens * text.hidden_size + (layer if depth else 0)
        parts["loss"] = 12 * text.vocab_size * tokens
        parts["workspace"] = 2 * text.hidden_size * inner
        products = 2 * tokens * self.setting.parameters[1]
        flops = products * (3 if self.setting.recipe.method == "full" else 2) + products * depth // n
        peak = Peak(sum(parts.values()), parts)
        moved = 4 * sum(parts.values())
        return self.setting.here(StepCost({"step": peak}, flops, moved, 0, static_parts(self.setting)))


def evaluation_by_formula(setting: TracedModel, rows: BatchShape) -> StepCost:
    """One evaluated batch."""
    text, parts = setting.config.get_text_config(), static_parts(setting)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    parts["activations"] = 2 * rows.tokens * (6 * text.hidden_size + 2 * inner)
    parts["loss"] = 8 * text.vocab_size * rows.tokens
    work = 2 * rows.tokens * setting.parameters[1]
    return setting.here(StepCost({"evaluate": Peak(sum(parts.values()), parts)}, work, 0, 0, static_parts(setting)))


def static_parts(setting: TracedModel) -> dict[str, int]:
    """Weights and adapters."""
    trainable, total = setting.parameters
    frozen = 0 if setting.recipe.method == "full" else total - trainable
    text = setting.config.get_text_config()
    tables = (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
    weight = {"full": 4 * total, "lora": 2 * frozen, "qlora": int(0.516 * (frozen - tables)) + 2 * tables}
    parts = dict.fromkeys(PARTS, 0)
    parts["weights"] = weight[setting.recipe.method]
    parts["adapters"] = 0 if setting.recipe.method == "full" else 4 * trainable
    return parts
