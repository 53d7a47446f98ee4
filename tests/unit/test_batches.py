"""Rows to batches: nothing lost, nothing beyond the capacity, what is learned in the right places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.data import IGNORED, FlatBatch, PadBatch, pack_rows, packs_of
from nybble.data.batches import filled, rows_of
from nybble.data.encode import EncodedRow, Example
from nybble.data.store import Examples, to_records
from nybble.data.tree import merge_contexts
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


TREE = {
    # 1 2 is continued by 3 4 5 and by 6, and 3 4 5 by 7 and 8 9.
    "input_ids": [1, 2, 3, 4, 5, 7, 8, 9, 6],
    "labels": [1, IGNORED, 3, IGNORED, 5, 7, 8, IGNORED, 6],
    "segments": ((2, -1), (3, 0), (1, 1), (2, 1), (1, 0)),
}


def test_a_tree_in_one_sequence_worked_by_hand() -> None:
    batch = FlatBatch()([ROWS[:1], [TREE], ROWS[2:]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3, 4, 5, 7, 8, 9, 6, 9, 10, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 5, 6, 2, 0, 1, 0, 0]]
    assert batch["lengths"] == (3, 2, 3, 1, 2, 1, 4)
    assert batch["parents"] == (-1, -1, 1, 2, 2, 1, -1)
    # The first tokens of 3 4 5 and of 6 are predicted by 2, those of 7 and 8 9 by 5.
    assert batch["learned"].tolist() == [1, 4, 6, 7, 7, 4, 12]
    assert batch["targets"].tolist() == [7, 3, 5, 7, 8, 6, 10]
    assert rows_of(batch)[:2] == [{**ROWS[0], "labels": [IGNORED, IGNORED, 7], "segments": ()}, without_first(TREE)]
    assert rows_of(batch)[2]["input_ids"] == [9, 10, 0, 0]
    assert FlatBatch()([ROWS])["parents"] == ()


def without_first(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [IGNORED, *row["labels"][1:]]}


def test_a_padded_batch_has_a_row_for_each_path() -> None:
    batch = PadBatch(0)([ROWS[:1], [TREE]])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 7, 0],
        [1, 2, 3, 4, 5, 8, 9],
        [1, 2, 6, 0, 0, 0, 0],
    ]
    learned = [[(i, label) for i, label in enumerate(row) if label != IGNORED] for row in batch["labels"].tolist()]
    assert learned == [[(0, 5), (2, 7)], [(0, 1), (2, 3), (4, 5), (5, 7)], [(5, 8)], [(2, 6)]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6, 7, 3]


CONTEXT = st.lists(st.integers(1, 3), min_size=1, max_size=8)


@given(st.lists(st.lists(CONTEXT, min_size=1, max_size=5), min_size=1, max_size=4))
def test_trees_flattened_and_unfolded_learn_the_same_tokens_behind_the_same(trees: list[list[list[int]]]) -> None:
    rows = []
    for paths in trees:
        ids, labels, segments = merge_contexts([(path, [i if i < 3 else IGNORED for i in path]) for path in paths])
        rows.append({"input_ids": ids, "labels": labels, "segments": segments})
    flat, padded = FlatBatch()([rows]), PadBatch(0)([rows])
    ids, labels = padded["input_ids"].tolist(), padded["labels"].tolist()
    both = list(zip(ids, labels, strict=True))
    wanted = [(tuple(row[:at]), row[at]) for row, k in both for at in range(1, len(k)) if k[at] != IGNORED]
    # What each position of the flat batch sees: its segment up to itself, and the segments that it continues.
    tokens, parents, lengths = flat["input_ids"][0].tolist(), flat["parents"], flat["lengths"]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    seen = []
    for place in flat["learned"].tolist():
        segment = max(i for i, start in enumerate(starts) if start <= place)
        path = tokens[starts[segment] : place + 1]
        while parents and parents[segment] >= 0:
            segment = parents[segment]
            path = tokens[starts[segment] : starts[segment] + lengths[segment]] + path
        assert flat["position_ids"][0, place] == len(path) - 1
        seen.append((tuple(path), flat["targets"][len(seen)].item()))
    assert sorted(seen) == sorted(wanted)


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
