"""Answers of a batch: which of its learned tokens belong together, and their log-probabilities.

An answer is one segment of a flattened batch, or one row of a padded one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nybble.data import IGNORED
from nybble.data.batches import FLAT_INPUTS


def with_answers(batch: dict[str, Any], ld_alpha: float | None = None, wants_prompts: bool = False) -> dict[str, Any]:
    """A collated batch, on the host, with what says which of its learned tokens belong together.

    Adds `answer_lengths`, a tuple with the learned tokens of each answer, in their order; of a padded batch also
    `learned` and `targets`, `(n,) int64`, as a flattened one has them, with places counted through all rows; with
    `ld_alpha` the `weights` of the tokens `(n,) float32`; and with `wants_prompts`, `learned` and `targets` go on with
    the prompts of the chosen answers, which belong to no answer.
    """
    batch = dict(batch)
    labels = batch["labels"]
    if "lengths" in batch:
        places = (labels[0] != IGNORED).nonzero().squeeze(1)
        ends = torch.tensor(batch["lengths"]).cumsum(0)
    else:
        width = labels.shape[1]
        behind = labels.clone()
        behind[:, 0] = IGNORED
        places = (behind.flatten() != IGNORED).nonzero().squeeze(1)
        ends = torch.arange(1, len(labels) + 1) * width
        batch |= {"learned": places - 1, "targets": labels.flatten()[places]}
    # An answer is one segment, or one row.
    part = torch.bucketize(places, ends, right=True)
    sizes = torch.unique_consecutive(part, return_counts=True)[1]
    batch["answer_lengths"] = tuple(sizes.tolist())
    if ld_alpha is not None:
        shorter = sizes.view(-1, 2).amin(1).repeat_interleave(2).repeat_interleave(sizes)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        batch["weights"] = torch.where(torch.arange(len(places)) - first < shorter, 1.0, ld_alpha)
    if wants_prompts:
        batch |= _with_prompts(batch, sizes, ends)
    return batch


def _with_prompts(batch: dict[str, Any], sizes: Tensor, ends: Tensor) -> dict[str, Tensor]:
    ids = batch["input_ids"].flatten()
    lasts = batch["learned"][(sizes.cumsum(0) - sizes)[::2]]  # the token before each chosen answer
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[torch.bucketize(lasts, ends, right=True)]
    before = [torch.arange(start, last) for start, last in zip(starts.tolist(), lasts.tolist(), strict=True)]
    prompts = torch.cat([torch.zeros(0, dtype=torch.int64), *before])
    return {
        "learned": torch.cat([batch["learned"], prompts]),
        "targets": torch.cat([batch["targets"], ids[prompts + 1]]),
    }


def token_log_probabilities(model: Any, inputs: dict[str, Any]) -> Tensor:
    """log p of each learned token of a batch that `with_answers` made, `(n,) float32`, with a graph if wanted."""
    if "lengths" in inputs:
        known = {name: inputs[name] for name in FLAT_INPUTS}
        return -model(**known, each_token=True).token_losses  # type: ignore[no-any-return]
    padded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**padded, use_cache=False).logits.flatten(0, 1)[inputs["learned"]]
    return -cross_entropy(logits.float(), inputs["targets"], reduction="none")


def sums_by_answer(values: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The sum of each answer, `(answers,)`, of values of its tokens, weighed where the batch has weights."""
    sizes = inputs["answer_lengths"]
    if not sizes:
        return values[:0]
    own = values[: sum(sizes)]
    # Part by part: a sum by index has no fixed order on a GPU.
    return torch.stack([part.sum() for part in (own * inputs["weights"] if "weights" in inputs else own).split(sizes)])
