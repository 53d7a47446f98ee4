"""Examples to tensors: rows behind each other in one sequence, or padded side by side where a model needs that.

What is drawn for a batch is a group of rows: one row, or as many as fill a length (`pack_rows`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nybble.data.encode import IGNORED, Example
from nybble.data.store import Examples
from nybble.recipe import DataSection

Group = Sequence[dict[str, list[int]]]  # rows that are drawn together
NOTHING: Group = ({"input_ids": [0], "labels": [IGNORED]},)  # a row of which nothing is learned


@dataclass(frozen=True)
class FlatBatch:
    """Lays rows behind each other, without padding. Called by torch's DataLoader."""

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What a model with our blocks takes; T is the number of tokens, `filled` up, n that of learned ones.

        `input_ids`, `position_ids` (from 0 in each row) and `labels` `(1, T) int64`; `lengths`, the tokens of each row,
        those that fill up counting to the last: no token before them sees them; `learned` `(n,) int64`, the places
        whose next token is learned, and `targets` `(n,) int64`, those tokens. All of it is made here, on the host, so
        that the step need not ask the device.
        """
        examples = [example for group in groups for example in group]
        lengths = [len(example["input_ids"]) for example in examples]
        n_tokens = sum(lengths)
        spare = filled(n_tokens) - n_tokens
        lengths[-1] += spare
        labels = [torch.tensor(example["labels"]) for example in examples]
        for row in labels:
            row[:1] = IGNORED  # nothing comes before a row's first token; in one sequence another row would
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
    """Puts rows side by side, padded to the longest. Called by torch's DataLoader."""

    pad_token_id: int

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `attention_mask`, each `(rows, longest) int64`."""
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
    """`n_tokens` rounded up so that few lengths differ: by a sixteenth at most.

    Libraries make and keep a kernel for each shape they meet, and allocators a block: oneDNN takes 1.5 ms for each new
    one, and a step has 30.
    """
    step = max(8, 1 << max(n_tokens.bit_length() - 5, 0))
    return -(-n_tokens // step) * step


class Groups(Sequence[Group]):
    """What a DataLoader draws from: each row by itself, or rows in the groups of `packs`; made when asked for."""

    def __init__(self, examples: Sequence[Example], packs: Sequence[Sequence[int]] | None = None) -> None:
        self._examples = examples
        self._packs = packs

    def __len__(self) -> int:
        return len(self._examples if self._packs is None else self._packs)

    def rows(self, index: int) -> list[int]:
        """Numbers of the rows in a group, from 1."""
        return [self._examples[place].row for place in self._places(index)]

    def _places(self, index: int) -> Sequence[int]:
        return (index,) if self._packs is None else self._packs[index]

    def __getitem__(self, index: Any) -> Any:
        chosen = (self._examples[place] for place in self._places(index))
        return [{"input_ids": example.input_ids, "labels": example.labels} for example in chosen]


def packs_of(examples: Examples, section: DataSection) -> list[list[int]] | None:
    """Rows, by number, that are drawn together; None: each by itself."""
    if section.packing is False:
        return None
    return pack_rows(
        examples.column("length").tolist(), section.max_length if section.packing is True else section.packing
    )


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows, by number, in groups of at most `capacity` tokens: best-fit decreasing, so groups are nearly full.

    The longest row goes first, each into the group with the least room that still takes it (Johnson 1973: at most
    11/9 of the fewest groups). A row longer than the capacity stands alone.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of the open groups, ascending: tokens that still fit, group
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(room, (lengths[row], -1))
        if at < len(room):
            left, pack = room.pop(at)
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], pack))
    return packs
