"""Rows to batches: nothing lost, nothing beyond the capacity, what is learned in the right places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.data import IGNORED, FlatBatch, PadBatch, pack_rows, packs_of
from nybble.data.batches import filled
from nybble.data.encode import EncodedRow, Example
from nybble.data.store import Examples, to_records
from nybble.recipe import DataSection

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, IGNORED, 7]},
    {"input_ids": [8], "labels": [8]},
    {"input_ids": [9, 10], "labels": [IGNORED, 10]},
]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 32))
def test_packs_hold_every_row_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    packs = pack_rows(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[row] for row in pack) <= capacity
    fewest = -(-sum(min(length, capacity) for length in lengths) // capacity)
    assert len(packs) <= 11 / 9 * max(fewest, sum(length * 2 > capacity for length in lengths)) + 1


def test_packs_are_nearly_full() -> None:
    lengths = torch.randint(20, 900, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = pack_rows(lengths, 1024)
    assert sum(lengths) / (1024 * len(packs)) > 0.99


def test_a_flat_batch_worked_by_hand() -> None:
    batch = FlatBatch()([ROWS[:2], ROWS[2:]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    assert batch["lengths"] == (3, 1, 4)  # filled up to a length that more batches have
    # A row's first token is never a target: in one sequence another row would stand before it.
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, IGNORED, 10, IGNORED, IGNORED]]
    assert batch["learned"].tolist() == [1, 4]
    assert batch["targets"].tolist() == [7, 10]


def test_filling_up_costs_a_sixteenth_at_most_and_leaves_few_lengths() -> None:
    sizes = {filled(n) for n in range(128, 4097)}
    assert all(n <= filled(n) <= n + max(7, n / 16) for n in range(1, 4097))
    assert len(sizes) == 1 + 5 * 16  # sixteen to each doubling


def test_a_padded_batch_worked_by_hand() -> None:
    batch = PadBatch(0)([ROWS[:2]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, IGNORED, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_are_drawn_together_as_the_recipe_says() -> None:
    made = [Example(list(range(n)), list(range(n)), 1, 1, 0, (2,), 0, 0, False) for n in (60, 30, 20)]
    examples = Examples([to_records(EncodedRow([one], len(one.input_ids), 1, 0, "") for one in made)])
    assert packs_of(examples, DataSection(max_length=64)) is None
    assert packs_of(examples, DataSection(max_length=64, packing=True)) == [[0], [1, 2]]
    assert packs_of(examples, DataSection(max_length=64, packing=128)) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="greater than or equal to 8"):
        DataSection(packing=4)
