"""Build batches: rows concatenated into one sequence, or padded side by side for models that need it.

A batch consists of groups of rows. A group is one row, or several rows that fill a given length (`pack_rows`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data.encode import Example
from nybble.data.store import Examples
from nybble.data.tokens import IGNORED
from nybble.recipe import DataSection

Group = Sequence[dict[str, Any]]  # rows that always enter the same batch: input_ids, labels and, of a tree, segments
NOTHING: Group = ({"input_ids": [0], "labels": [IGNORED]},)  # a row without any token to learn


@dataclass(frozen=True)
class FlatBatch:
    """Concatenates rows into one sequence without padding; a collate function for torch's DataLoader."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The inputs of a model with Nybble's blocks.

        T is the number of tokens rounded up by `filled`, and n is the number of tokens to learn. The result holds
        `input_ids`, `position_ids` (from 0 in each row) and `labels`, each `(1, T) int64`; `lengths`, a tuple with the
        number of tokens of each row (the tokens added by rounding count towards the last row, and no earlier token
        attends to them); `learned` `(n,) int64`, the positions whose next token is learned; and `targets`
        `(n,) int64`, those next tokens. Everything is computed on the host, so the step never waits for the device.
        """
        examples = [example for group in groups for example in group]
        lengths = [len(example["input_ids"]) for example in examples]
        n_tokens = sum(lengths)
        spare = filled(n_tokens) - n_tokens
        lengths[-1] += spare
        labels = [torch.tensor(example["labels"]) for example in examples]
        for row in labels:
            row[:1] = IGNORED  # in one sequence the token before a row's first token belongs to another row
        flat = torch.cat([*labels, torch.full((spare,), IGNORED)])
        learned = (flat[1:] != IGNORED).nonzero().squeeze(1)
        nothing = torch.zeros(spare, dtype=torch.int64)
        return {
            "input_ids": torch.cat([*(torch.tensor(example["input_ids"]) for example in examples), nothing])[None],
            "position_ids": torch.cat([*(torch.arange(len(row)) for row in labels), nothing])[None],
            "labels": flat[None],
            "lengths": tuple(lengths),
            "learned": learned,
            "targets": flat[learned + 1],
        }


@dataclass(frozen=True)
class PadBatch:
    """Pads rows to the longest one of the batch; a collate function for torch's DataLoader."""

    pad_token_id: int

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The tensors `input_ids`, `labels` and `attention_mask`, each `(rows, longest) int64`."""
        examples = [example for group in groups for example in group]
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


def filled(n_tokens: int) -> int:
    """Round `n_tokens` up by at most a sixteenth, so that batches have few different lengths.

    Libraries build and cache a kernel for each new shape, and allocators a block: oneDNN takes 1.5 ms for each new
    shape, and a step has 30 of them.
    """
    step = max(8, 1 << max(n_tokens.bit_length() - 5, 0))
    return -(-n_tokens // step) * step


class Groups(Sequence[Group]):
    """The groups that a DataLoader indexes: single rows, or the groups listed in `packs`; each is built on access."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]] | None = None) -> None:
        self._examples = examples
        self._packs = packs

    def __len__(self) -> int:
        return len(self._examples if self._packs is None else self._packs)

    def rows(self, index: int) -> list[int]:
        """The row numbers in a group; rows are numbered from 1."""
        return [self._examples[place].row for place in self._places(index)]

    def _places(self, index: int) -> Sequence[int]:
        return (index,) if self._packs is None else self._packs[index]

    def __getitem__(self, index: Any) -> Any:
        chosen = (self._examples[place] for place in self._places(index))
        return [{"input_ids": e.input_ids, "labels": e.labels, "segments": e.segments} for e in chosen]


def packs_of(examples: Examples, section: DataSection) -> list[list[int]] | None:
    """The packs of rows, as indices from 0, that `section.packing` asks for; None if every row is its own group."""
    if section.packing is False:
        return None
    return pack_rows(
        examples.column("length").tolist(), section.max_length if section.packing is True else section.packing
    )


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack rows, as indices from 0, into groups of at most `capacity` tokens by best-fit decreasing.

    Rows are placed from the longest to the shortest, each into the group with the least room that still fits it
    (Johnson 1973: at most 11/9 of the optimal number of groups). A row longer than the capacity is a group by itself.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, group) of the groups that are not full, ascending
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(room, (lengths[row], -1))
        if at < len(room):
            left, pack = room.pop(at)
        else:
            left = capacity
            pack = len(packs)
            packs.append([])
        packs[pack].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], pack))
    return packs
