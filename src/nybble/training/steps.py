"""The Trainer with our seeds and our depth of recomputation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nybble.models import is_sharded
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.nn.workspace import workspace
from nybble.training.depth import Recomputation
from nybble.training.parity import Parity, check, compare
from nybble.training.resuming import ResumableTrainer

_MICRO_STEPS = 1 << 20  # of one optimizer step, at most
_SMALL_SHARE = 0.1  # trained parameters below this share: gradients are copied so that a batch can be taken again


class StepTrainer(ResumableTrainer):
    """Before each micro-step: the seed of its dropout, and how many layers it recomputes.

    A batch that runs out of memory is taken again with more layers recomputed, from the same gradients and seeds: what
    is learned is the same.
    """

    def __init__(
        self,
        seeds: DropoutSeeds,
        recomputation: Recomputation | None,
        note: Callable[[str], None],
        parity_steps: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if is_sharded(self.model):  # its gradients are reduced already: accelerate shall add its autocast alone
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._seeds = seeds
        self._recomputation = recomputation
        self._note = note
        self._told = False
        self._parity_steps = parity_steps
        self.parities: list[Parity] = []
        # Walking over a model's modules takes as long as a small layer: once will do.
        self._learning = [p for p in self.model.parameters() if p.requires_grad]
        n_trained, n_all = (sum(p.numel() for p in ps) for ps in (self._learning, self.model.parameters()))
        self._is_small = n_trained < _SMALL_SHARE * n_all

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch."""
        # The backward pass on a GPU would run in a thread of its own, with reused memory of its own.
        with torch.autograd.set_multithreading_enabled(False):
            return self._taken(model, inputs, num_items_in_batch)

    def _taken(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        step = self.state.global_step
        number, was_done = self.next_micro_batch()
        if was_done:
            return torch.zeros((), device=self.args.device)
        # As one process numbers them: the same micro-batches draw the same dropout.
        self._seeds.micro_step = step * _MICRO_STEPS + number * self.processes.count + self.processes.rank
        if step < self._parity_steps and "lengths" in inputs:
            self._compare(self.model, inputs, num_items_in_batch)  # without what gathers gradients
        loss = self._step(model, inputs, num_items_in_batch)
        self.step_loss += loss
        return loss

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Again with more layers recomputed, as long as it runs out of memory."""
        step = self.state.global_step
        if self._recomputation is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        n_tokens = inputs["input_ids"].numel()
        self._recomputation.prepare(n_tokens)
        before = _Gradients(self._learning, self._is_small)
        while True:
            try:
                return super().training_step(model, dict(inputs), num_items_in_batch)  # type: ignore[no-any-return]
            except torch.OutOfMemoryError:
                # Many processes cannot go back: the others are in the middle of the pass.
                if self.processes.are_many or not before.kept or not self._recomputation.deepen(n_tokens):
                    raise
            # Only here, outside the handler, are the failed pass's tensors gone.
            before.restore()
            workspace.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not self._told:
                self._told = True
                self._note(
                    f"memory ran out at step {step + 1}: the batch is taken again with "
                    f"{self._recomputation.depth} layers recomputed, later ones with less room; the result is the same"
                )

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
        if self._recomputation is not None and self._recomputation.in_words:
            made.append(self._recomputation.in_words)
        return tuple(made)

    def _compare(self, model: Any, inputs: dict[str, Any], n_items: Any) -> None:
        """Hold this micro-batch against the plain path."""
        model.train()
        parity = compare(model, self._prepare_inputs(inputs), n_items)
        self.parities.append(parity)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        check(parity, self.state.global_step + 1, dtype)


class _Gradients:
    """Gradients of the micro-batches before this one."""

    def __init__(self, trained: Sequence[nn.Parameter], may_copy: bool) -> None:
        self._trained = trained
        self._values: list[Tensor | None] = [None] * len(trained)
        self.kept = all(p.grad is None for p in trained)
        if not self.kept and may_copy:
            self._values = [None if p.grad is None else p.grad.clone() for p in trained]
            self.kept = True

    def restore(self) -> None:
        """Put them back."""
        for parameter, value in zip(self._trained, self._values, strict=True):
            parameter.grad = None if value is None else value.clone()
