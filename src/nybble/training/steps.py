"""transformers' Trainer with our seeds and our depth of recomputation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from nybble.nn.seeds import Seeds
from nybble.training.depth import Recomputation
from nybble.training.parity import Parity, check, compare

_MICRO_STEPS = 1 << 20  # of one optimizer step, at most


class StepTrainer(Trainer):
    """Before each micro-step: the seed of its dropout, and how many layers it recomputes."""

    def __init__(
        self, seeds: Seeds, recomputation: Recomputation | None, parity_steps: int = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._seeds = seeds
        self._recomputation = recomputation
        self._parity_steps = parity_steps
        self.parities: list[Parity] = []
        self._last = (-1, 0)  # optimizer step, micro-steps of it that are done

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch."""
        step = self.state.global_step
        done = self._last[1] if self._last[0] == step else 0
        self._last = (step, done + 1)
        self._seeds.micro_step = step * _MICRO_STEPS + done
        if step < self._parity_steps and "lengths" in inputs:
            self._compare(model, inputs, num_items_in_batch)
        if self._recomputation is not None:
            self._recomputation.prepare(inputs["input_ids"].numel())
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]

    def notes(self) -> tuple[str, ...]:
        """What people should know of the steps."""
        made = []
        if self.parities:
            loss = max(parity.loss_difference for parity in self.parities)
            gradient = max(parity.gradient_difference for parity in self.parities)
            made.append(
                f"{len(self.parities)} micro-steps beside the plain path: loss within {loss:.1e}, "
                f"gradients within {gradient:.1e}"
            )
        if self._recomputation is not None and self._recomputation.deepest:
            made.append(f"up to {self._recomputation.deepest} layers were recomputed to stay within memory")
        return tuple(made)

    def _compare(self, model: Any, inputs: dict[str, Any], n_items: Any) -> None:
        """Hold this micro-batch against the plain path."""
        model.train()
        parity = compare(model, self._prepare_inputs(inputs), n_items)
        self.parities.append(parity)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        check(parity, self.state.global_step + 1, dtype)
