"""What is minimised: a function of the model and a batch.

An objective sums its loss over the learned tokens of a micro-batch and divides by those of the whole optimizer step, so
that the losses of the micro-batches of a step, summed, are its mean, however the step is split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nybble.data import IGNORED

Objective = Callable[[Any, dict[str, Any], Tensor], Tensor]
"""`objective(model, inputs, n_learned)` -> this micro-batch's share of the step's loss, a scalar with a graph.

`inputs` are on the device; `n_learned`, float32, is the number of learned tokens in the whole step.
"""


def next_token_loss(model: Any, inputs: dict[str, Any], n_learned: Tensor) -> Tensor:
    """Cross entropy of the learned tokens, in nats."""
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
