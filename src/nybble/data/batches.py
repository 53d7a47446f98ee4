"""Examples to tensors: rows behind each other in one sequence, or padded side by side where a model needs that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data.encode import IGNORED, Example


@dataclass(frozen=True)
class FlatBatch:
    """Lays rows behind each other, without padding. Called by torch's DataLoader."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What a model with our blocks takes; T is the number of tokens, n that of learned ones.

        `input_ids`, `position_ids` (from 0 in each row) and `labels` `(1, T) int64`; `lengths`, the tokens of each row;
        `learned` `(n,) int64`, the places whose next token is learned, and `targets` `(n,) int64`, those tokens. All of
        it is made here, on the host, so that the step need not ask the device.
        """
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        for row in labels:
            row[:1] = IGNORED  # nothing comes before a row's first token; in one sequence another row would
        flat = torch.cat(labels)
        learned = (flat[1:] != IGNORED).nonzero().squeeze(1)
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
            "labels": flat[None],
            "lengths": tuple(len(row) for row in ids),
            "learned": learned,
            "targets": flat[learned + 1],
        }


@dataclass(frozen=True)
class PadBatch:
    """Puts rows side by side, padded to the longest. Called by torch's DataLoader."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `attention_mask`, each `(rows, longest) int64`."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            attention_mask[row, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def as_features(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """What a DataLoader over examples yields one of."""
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
