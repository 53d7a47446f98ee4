"""What is minimised: a function of the model and a batch.

An objective sums its loss over the items of a micro-batch (learned tokens, pairs of answers) and divides by those of
the whole optimizer step, so that the losses of the micro-batches of a step, summed, are its mean, however the step is
split. The loop does not know which objective it minimises.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nybble.data import IGNORED

if TYPE_CHECKING:
    from nybble.training.dataloader import MicroBatch, StepLoader


class Objective(Protocol):
    """A loss, with what it counts and what it reports."""

    figures: tuple[str, ...]
    """What is reported of a step beside its loss."""

    def collate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the collator made it, on the host, with what the objective needs beside it."""
        ...

    def counts(self, batch: MicroBatch) -> tuple[int, ...]:
        """What the sums of a step are divided by; each is added up over its micro-batches and processes."""
        ...

    def begin_step(self, model: Any, loader: StepLoader, step: int) -> None:
        """Is called before the first micro-batch of each step, with the weights that all of the step is done with."""
        ...

    def beside(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Further inputs, on the host: what is known of the examples at these places."""
        ...

    def __call__(self, model: Any, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, a scalar with a graph, and of its figures `(figures,) float32`.

        `inputs` are on the device; `counts`, float32 scalars, are those of the whole step.
        """
        ...


class NextToken:
    """Supervised fine-tuning: the cross entropy of the learned tokens, each weighing the same."""

    figures: tuple[str, ...] = ()

    def collate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as it is."""
        return batch

    def counts(self, batch: MicroBatch) -> tuple[int, ...]:
        """The learned tokens."""
        return (batch.n_learned,)

    def begin_step(self, model: Any, loader: StepLoader, step: int) -> None:
        """Nothing."""

    def beside(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def __call__(self, model: Any, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss."""
        loss = next_token_loss(model, inputs, counts[0])
        return loss, torch.zeros(0, device=loss.device)


def next_token_loss(model: Any, inputs: dict[str, Any], n_learned: Tensor) -> Tensor:
    """Cross entropy of the learned tokens, in nats; `n_learned`, float32, is their number in the whole step."""
    settings = {} if "lengths" in inputs else {"use_cache": False}
    if _divides_by_step(model):
        loss: Tensor = model(**inputs, **settings, num_items_in_batch=n_learned).loss
    else:
        n_learned_here = (inputs["labels"][..., 1:] != IGNORED).sum()
        loss = model(**inputs, **settings).loss * (n_learned_here / n_learned)
    return loss


def _divides_by_step(model: Any) -> bool:
    """Whether a model of transformers divides its loss by the number it is given, as transformers' Trainer asks it."""
    bare = getattr(model, "module", model)  # without DistributedDataParallel
    if hasattr(bare, "get_base_model"):
        bare = bare.get_base_model()
    if hasattr(bare, "accepts_loss_kwargs"):
        return bool(bare.accepts_loss_kwargs)
    parameters = inspect.signature(bare.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
