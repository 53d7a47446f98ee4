"""Build batches: rows concatenated into one sequence, or padded side by side for models that need it.

A batch consists of groups of rows. A group is one row, or several rows that fill a given length (`pack_rows`). A row
may be a tree of contexts (`nybble.data.tree`): in one sequence it stays one, in padded batches its paths become rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from nybble.data.encode import Example
from nybble.data.store import Examples
from nybble.data.tokens import IGNORED
from nybble.data.tree import unfold
from nybble.recipe import DataSection

Group = Sequence[dict[str, Any]]  # rows that always enter the same batch: input_ids, labels and, of a tree, segments
NOTHING: Group = ({"input_ids": [0], "labels": [IGNORED]},)  # a row without any token to learn
# What a model with Nybble's blocks takes of a flattened batch.
FLAT_INPUTS = ("input_ids", "position_ids", "labels", "lengths", "parents", "learned", "targets")


@dataclass(frozen=True)
class FlatBatch:
    """Concatenates rows into one sequence without padding; a collate function for torch's DataLoader."""

    trees: bool = True  # rows that are trees stay trees; else each of their paths becomes a row

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The inputs of a model with Nybble's blocks.

        T is the number of tokens rounded up by `filled`, and n is the number of tokens to learn. The result holds
        `input_ids`, `position_ids` (from 0 in each row, and along each path of a tree) and `labels`, each
        `(1, T) int64`; `lengths`, a tuple with the number of tokens of each row, or of each segment of a tree (the
        tokens added by rounding count towards the last one, and no earlier token attends to them); `parents`, a tuple
        with the index of the segment that each segment continues, or -1, empty if there is no tree; `learned`
        `(n,) int64`, the positions whose next token is learned, which is the first of a branch for the last of what it
        continues; and `targets` `(n,) int64`, those next tokens. Everything is computed on the host, so the step never
        waits for the device.
        """
        examples = [example for group in groups for example in group]
        if not self.trees:
            examples = [{"input_ids": ids, "labels": labels} for ids, labels in _unfolded(examples)]
        lengths, parents = _segments(examples)
        starts = [0, *accumulate(lengths)]
        n_tokens = starts[-1]
        spare = filled(n_tokens) - n_tokens
        nothing = torch.zeros(spare, dtype=torch.int64)
        offsets = _offsets(lengths, parents)
        positions = [torch.arange(first, first + n) for first, n in zip(offsets, lengths, strict=True)]
        flat = torch.cat([*(torch.tensor(example["labels"]) for example in examples), torch.full((spare,), IGNORED)])
        before = torch.arange(-1, n_tokens + spare - 1)  # of each token, the one that predicts it
        for start, parent in zip(starts, parents, strict=False):
            if parent < 0:
                flat[start : start + 1] = IGNORED  # in one sequence the token before belongs to another row
            else:
                before[start] = starts[parent + 1] - 1
        learned = (flat != IGNORED).nonzero().squeeze(1)
        lengths[-1] += spare
        return {
            "input_ids": torch.cat([*(torch.tensor(example["input_ids"]) for example in examples), nothing])[None],
            "position_ids": torch.cat([*positions, nothing])[None],
            "labels": flat[None],
            "lengths": tuple(lengths),
            "parents": tuple(parents) if max(parents) >= 0 else (),
            "learned": before[learned],
            "targets": flat[learned],
        }


def _unfolded(examples: Iterable[dict[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each row, and of each path of a tree."""
    for example in examples:
        yield from unfold(example["input_ids"], example["labels"], example.get("segments", ()))


def _segments(examples: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The length of each segment of a batch, a row that is no tree being one, and the index of its parent or -1."""
    lengths: list[int] = []
    parents: list[int] = []
    for example in examples:
        first = len(lengths)
        for length, parent in example.get("segments") or ((len(example["input_ids"]), -1),):
            lengths.append(length)
            parents.append(first + parent if parent >= 0 else -1)
    return lengths, parents


def _offsets(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The position of each segment's first token in its row."""
    offsets: list[int] = []
    for parent in parents:
        offsets.append(offsets[parent] + lengths[parent] if parent >= 0 else 0)
    return offsets


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a flattened batch, of which trees have `segments`; spare tokens belong to the last row."""
    parents = batch["parents"] or (-1,) * len(batch["lengths"])
    roots = [index for index, parent in enumerate(parents) if parent < 0]
    rows: list[dict[str, Any]] = []
    start = 0
    for root, end in pairwise([*roots, len(parents)]):
        lengths = batch["lengths"][root:end]
        own = slice(start, start + sum(lengths))
        below = (-1, *(parent - root for parent in parents[root + 1 : end]))
        segments = tuple(zip(lengths, below, strict=True)) if end > root + 1 else ()
        rows.append({name: batch[name][0, own].tolist() for name in ("input_ids", "labels")} | {"segments": segments})
        start = own.stop
    return rows


@dataclass(frozen=True)
class PadBatch:
    """Pads rows to the longest one of the batch; a collate function for torch's DataLoader."""

    pad_token_id: int

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The tensors `input_ids`, `labels` and `attention_mask`, each `(rows, longest) int64`."""
        rows = list(_unfolded(example for group in groups for example in group))
        shape = (len(rows), max(len(ids) for ids, _labels in rows))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (ids, wanted) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(wanted)
            attention_mask[row, : len(ids)] = 1
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
        return [self._examples[place].row for place in self.places(index)]

    def places(self, index: int) -> Sequence[int]:
        """The places of a group's examples among all examples."""
        return (index,) if self._packs is None else self._packs[index]

    def __getitem__(self, index: Any) -> Any:
        chosen = (self._examples[place] for place in self.places(index))
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
