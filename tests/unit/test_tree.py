"""Contexts of one conversation in one sequence: nothing lost, nothing learned twice, shared prefixes once."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from nybble.data import IGNORED, Groups, Ledger, Prepared
from nybble.data.encode import EncodedRow, Example
from nybble.data.store import Examples, map_records, to_records, write_records
from nybble.data.tree import merge_contexts, path_before, paths, places_in_tree, unfold
from nybble.exporting.verify import Reference

Context = tuple[list[int], list[int]]


def learned(ids: list[int], *where: int) -> Context:
    """A context that learns the tokens at these indices."""
    return ids, [token if at in where else IGNORED for at, token in enumerate(ids)]


@st.composite
def contexts(draw: st.DrawFn) -> list[Context]:
    """Contexts of few different tokens, so that many share prefixes; the tokens at even indices alone are learned."""
    rows = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=7))
    masks = [draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in rows]
    return [
        (row, [t if mask else IGNORED for t, mask in zip(row, chosen, strict=True)])
        for row, chosen in zip(rows, masks, strict=True)
    ]


def test_a_tree_worked_by_hand() -> None:
    # The template drops the reasoning (7, 8) of the first answer (7, 8, 3) once a second question (4) follows.
    first = learned([1, 2, 7, 8, 3], 2, 3, 4)
    second = learned([1, 2, 3, 4, 9, 3], 4, 5)
    ids, labels, segments = merge_contexts([first, second])
    assert ids == [1, 2, 7, 8, 3, 3, 4, 9, 3]
    assert labels == [IGNORED, IGNORED, 7, 8, 3, IGNORED, IGNORED, 9, 3]
    assert segments == ((2, -1), (3, 0), (4, 0))
    assert paths(segments) == [[0, 1], [0, 2]]
    assert unfold(ids, labels, segments) == [first, second]
    assert places_in_tree(ids, segments, second[0]) == [0, 1, 5, 6, 7, 8]
    assert path_before(ids, segments, 7) == [1, 2, 3, 4]
    assert path_before(ids, segments, 9) == second[0]


def test_a_branch_may_branch_again() -> None:
    rows = [[1, 2, 3, 4], [1, 5], [1, 2, 3, 6], [1, 2, 7], [8, 1], [1, 2, 3]]
    ids, labels, segments = merge_contexts([learned(row, len(row) - 1) for row in rows])
    assert ids == [1, 2, 3, 4, 6, 7, 5, 8, 1]
    assert segments == ((1, -1), (1, 0), (1, 1), (1, 2), (1, 2), (1, 1), (1, 0), (2, -1))
    assert [row for row, _labels in unfold(ids, labels, segments)] == [rows[0], rows[2], rows[3], rows[1], rows[4]]


def test_prefixes_of_one_context_are_one_plain_row() -> None:
    rows = [learned([1, 2], 1), learned([1, 2, 3, 4], 3), learned([1, 2, 3], 2)]
    assert merge_contexts(rows) == ([1, 2, 3, 4], [IGNORED, 2, 3, 4], ())
    assert merge_contexts(rows[::-1]) == ([1, 2, 3, 4], [IGNORED, 2, 3, 4], ())


def test_a_shared_token_is_learned_once() -> None:
    rows = [learned([1, 2, 3], 1), learned([1, 2, 4], 1, 2), learned([1, 2, 5], 2)]
    ids, labels, segments = merge_contexts(rows)
    assert labels == [IGNORED, 2, IGNORED, 4, 5]
    assert unfold(ids, labels, segments) == [
        ([1, 2, 3], [IGNORED, 2, IGNORED]),
        ([1, 2, 4], [IGNORED, IGNORED, 4]),
        ([1, 2, 5], [IGNORED, IGNORED, 5]),
    ]


@given(contexts())
def test_every_context_is_a_path_and_every_prefix_occurs_once(given: list[Context]) -> None:
    before = [(list(ids), list(labels)) for ids, labels in given]
    ids, labels, segments = merge_contexts(given)
    assert given == before  # the contexts are not changed
    rows = unfold(ids, labels, segments)
    prefixes = {tuple(row[:n]) for row, _labels in given for n in range(1, len(row) + 1)}
    assert len(ids) == len(labels) == len(prefixes)
    assert {tuple(row[:n]) for row, _labels in rows for n in range(1, len(row) + 1)} == prefixes
    # A learned prefix is learned once, in the row and in the tree; the first token of a row never is.
    wanted = {tuple(row[: at + 1]) for row, wants in given for at, x in enumerate(wants) if x != IGNORED and at}
    found = [tuple(row[: at + 1]) for row, wants in rows for at, x in enumerate(wants) if x != IGNORED and at]
    assert sorted(found) == sorted(wanted)
    assert sum(label != IGNORED for label in labels[1:]) == len(wanted)
    assert sum(length for length, _parent in segments) == (len(ids) if segments else 0)
    assert len(rows) == len(paths(segments)) or (not segments and len(rows) == 1)
    for row, _labels in given:
        places = places_in_tree(ids, segments, row)
        assert [ids[place] for place in places] == row
        for at, place in enumerate(places):
            assert path_before(ids, segments, place) == row[:at]


def test_segments_are_stored_with_the_examples(tmp_path: Path) -> None:
    ids, labels, segments = merge_contexts([learned([1, 2, 3], 2), learned([1, 4, 5], 2)])
    tree = Example(ids, labels, 2, 2, 0, (3, 5), 0, 4, False, 1, None, segments)
    plain = Example([1, 2], [IGNORED, 2], 1, 1, 0, (2,), 0, 1, False, 2)
    records = to_records(EncodedRow([one], len(one.input_ids), 1, 0, "") for one in (tree, plain))
    write_records([records], tmp_path / "examples.arrow")
    for examples in (Examples([records]), Examples(map_records(tmp_path / "examples.arrow"))):
        assert list(examples) == [tree, plain]
        assert examples[0].prompt_ids == [1, 4]
        assert [row["segments"] for group in Groups(examples) for row in group] == [segments, ()]


def test_what_takes_whole_rows_is_given_the_contexts_of_a_tree() -> None:
    first, second = learned([1, 2, 7, 8, 3], 2, 3, 4), learned([1, 2, 3, 4, 9, 3], 4, 5)
    ids, labels, segments = merge_contexts([first, second])
    tree = Example(ids, labels, 2, 2, 0, (3,), 0, 7, False, 1, None, segments)
    examples = Examples([to_records([EncodedRow([tree], len(ids), 2, 0, "")])])
    none = examples[:0]
    prepared = Prepared(examples, none, cast(Ledger, None), "", none, None)
    assert prepared.calibration_rows(4) == [second[0]]
    reference = Reference(list(examples), 8, (3,))
    reference._choose(vocabulary=300)
    assert reference._chosen == [
        {"ids": first[0], "first": 0, "positions": [2, 3, 4]},
        {"ids": second[0], "first": 3, "positions": [4, 5]},
    ]
    assert reference.prompts == [[1, 2, 3, 4]]
