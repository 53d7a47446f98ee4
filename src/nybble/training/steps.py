"""transformers' Trainer with our seeds and our depth of recomputation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from nybble.nn.seeds import Seeds
from nybble.training.depth import Recomputation

_MICRO_STEPS = 1 << 20  # of one optimizer step, at most


class StepTrainer(Trainer):
    """Before each micro-step: the seed of its dropout, and how many layers it recomputes."""

    def __init__(self, seeds: Seeds, recomputation: Recomputation | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._seeds = seeds
        self._recomputation = recomputation
        self._last = (-1, 0)  # optimizer step, micro-steps of it that are done

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch."""
        step = self.state.global_step
        done = self._last[1] if self._last[0] == step else 0
        self._last = (step, done + 1)
        self._seeds.micro_step = step * _MICRO_STEPS + done
        if self._recomputation is not None:
            self._recomputation.prepare(inputs["input_ids"].numel())
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
