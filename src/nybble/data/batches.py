"""Examples to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data.encode import IGNORED, Example


@dataclass(frozen=True)
class PadBatch:
    """Puts examples side by side, padded to the longest. Called by torch's DataLoader."""

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
