"""Rows of embeddings and head for tokens that a base lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.models.skeleton import base_of


def with_mean_rows(weight: Tensor, size: int, n_known: int | None = None) -> Tensor:
    """`weight` with as many rows as `size`; those that it lacks are the mean of its first `n_known`, or of all."""
    lacking = size - len(weight)
    if lacking <= 0:
        return weight
    return torch.cat([weight, mean_row(weight, n_known).expand(lacking, -1)])


def mean_row(weight: Tensor, n_known: int | None = None) -> Tensor:
    """The mean of the first `n_known` rows, or of all; summed in float32, in the type of `weight`."""
    return weight[:n_known].float().mean(dim=0).to(weight.dtype)


def grow_vocabulary(model: Any, size: int, n_known: int | None = None) -> None:
    """Give embeddings and head of `model` at least `size` rows, in place; the model's blocks and ties stay.

    transformers' `resize_token_embeddings` would put another module in the place of the head.
    """
    base = base_of(model)
    made: dict[int, nn.Parameter] = {}  # a tied weight grows once
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is None or len(module.weight) >= size:
            continue
        weight = module.weight
        if id(weight) not in made:
            grown = with_mean_rows(weight.detach(), size, n_known)
            made[id(weight)] = nn.Parameter(grown, requires_grad=weight.requires_grad)
        module.weight = made[id(weight)]
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias = nn.Parameter(nn.functional.pad(bias.detach(), (0, size - len(bias))), bias.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", size)
    if made:
        base.config.get_text_config().vocab_size = size
        if hasattr(base, "vocab_size"):
            base.vocab_size = size
