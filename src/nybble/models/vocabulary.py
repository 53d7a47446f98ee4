"""Tokens that a tokenizer lacks, and the rows of embeddings and head that they need.

A new token starts as the mean of all tokens, in the embeddings and in the head: it then says nothing about what comes
next, is as likely as an average token, and the same on every start. Its rows are learned as PEFT learns single rows
(`trainable_token_indices`), and the adapter holds their values, so that nothing depends on the base's own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.models.skeleton import base_of


@dataclass(frozen=True)
class NewTokens:
    """The tokens whose rows are learned."""

    ids: tuple[int, ...] = ()
    n_known: int = 0  # tokens that the tokenizer had before; those of `ids` from here on are new to it

    @property
    def n_embeddings(self) -> int:
        """The rows that embeddings and head need at least."""
        return max(self.ids, default=-1) + 1


def add_new_tokens(tokenizer: Any, names: Sequence[str]) -> NewTokens:
    """Add `names` to the tokenizer, in place; one that is a token already keeps its number."""
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    lacking = [AddedToken(name, normalized=False, special=False) for name in names if name not in vocabulary]
    if lacking:
        tokenizer.add_tokens(lacking)
    n_known = max(vocabulary.values(), default=-1) + 1
    return NewTokens(tuple(tokenizer.convert_tokens_to_ids(list(names))), n_known)


def make_room(model: Any, tokens: NewTokens) -> None:
    """Give embeddings and head of a bare `model` the rows of `tokens`, in place; those of new ones are the mean."""
    grow_vocabulary(model, tokens.n_embeddings, tokens.n_known)
    fresh = [token for token in tokens.ids if token >= tokens.n_known]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {id(t.weight): t.weight for t in tables if t is not None}.values():
            weight[fresh] = mean_row(weight, tokens.n_known)


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
