"""Mix the rows of several data sets in a fixed order, each as often as its weight says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.data.ledger import first_of_rows
from nybble.data.rows import Rows
from nybble.data.store import Examples
from nybble.recipe import DataSet


@dataclass(frozen=True)
class Mixture:
    """The examples of all sets, whose rows are numbered from 1 in the order of the mixture."""

    examples: Examples
    set_of_row: NDArray[np.int64]  # which set each row is from, `(rows,)`
    fingerprint: str  # SHA-256 of the rows of all sets, and of how often each is taken


def mix_sets(sets: Sequence[DataSet], rows: Sequence[Rows], encoded: Sequence[Examples]) -> Mixture:
    """Mix the examples of several sets.

    The rows of each set are spread evenly over the mixture, so that every stretch of it has all sets in proportion. A
    set with the weight 2 is taken twice, one with the weight 0.5 every second row.

    Args:
        sets: how often each set is taken.
        rows: the rows of each.
        encoded: their examples.
    """
    if len(sets) == 1 and sets[0].weight == 1 and sets[0].rows is None:
        return Mixture(encoded[0], np.zeros(len(rows[0]), np.int64), rows[0].fingerprint)
    taken = [_rows_taken(part, len(own)) for part, own in zip(sets, rows, strict=True)]
    sizes = [len(numbers) for numbers in taken]
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    owners = np.repeat(np.arange(len(sets)), sizes)
    order = np.lexsort((owners, places))
    # First the examples of each row that is taken, as indices into all sets one after the other; then their order.
    starts: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.int64]] = []
    before = 0
    for examples, numbers in zip(encoded, taken, strict=True):
        first = first_of_rows(examples)
        starts.append(first[numbers] + before)
        counts.append(np.diff(first, append=len(examples))[numbers])
        before += len(examples)
    start = np.concatenate(starts)[order]
    count = np.concatenate(counts)[order]
    row = np.repeat(np.arange(len(order)), count)
    place_in_row = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    content = [(own.fingerprint, size) for own, size in zip(rows, sizes, strict=True)]
    return Mixture(
        examples=Examples.join(encoded, start[row] + place_in_row, row + 1),
        set_of_row=owners[order],
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    )


def _rows_taken(part: DataSet, n_rows: int) -> NDArray[np.int64]:
    """The rows that a set contributes, as indices: all of them as often as they fit, then some at equal distances."""
    wanted = part.rows if part.rows is not None else max(1, round(part.weight * n_rows))
    whole, rest = divmod(wanted, n_rows)
    some = (np.arange(rest) * n_rows) // max(rest, 1)
    return np.concatenate([np.tile(np.arange(n_rows), whole), some]).astype(np.int64)
