"""Store examples as Arrow records: in memory if they are few, memory-mapped from a file if they are many.

A record is one example; a row that was split has several consecutive records. Ids and labels share a column: a token
that is not learned is stored as its complement (`~id`, which is negative), so an example takes four bytes per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from nybble.data.encode import EncodedRow, Example, key_of
from nybble.data.kinds import KINDS
from nybble.data.tokens import IGNORED
from nybble.data.tree import paths

_COPIED = (
    "row", "answer", "n_answers", "n_stops", "n_cut_stops", "n_empty", "last_answer_start", "is_truncated", "is_pair",
    "is_desirable", "n_chosen", "n_rejected", "n_cut_sides"
)  # fmt: skip
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),  # id where learned, else ~id
        "row": pa.int64(),
        "answer": pa.string(),
        "n_answers": pa.int32(),
        "n_stops": pa.int32(),
        "n_cut_stops": pa.int32(),
        "stop_tokens": pa.list_(pa.int32()),
        "n_empty": pa.int32(),
        "last_answer_start": pa.int32(),
        "is_truncated": pa.bool_(),
        "segments": pa.list_(pa.int32()),  # length and parent of each in turn
        "spans": pa.list_(pa.int32()),  # first token, end and kind (its index in KINDS) of each in turn
        "is_pair": pa.bool_(),
        "is_desirable": pa.bool_(),
        "n_chosen": pa.int32(),
        "n_rejected": pa.int32(),
        "n_cut_sides": pa.int32(),
        # Columns for the ledger: first those of the example, then those of its row.
        "length": pa.int32(),
        "n_paths": pa.int32(),  # rows that a padded batch has for it
        "longest_path": pa.int32(),  # the tokens of the longest of them
        "n_trained": pa.int32(),
        "n_shared": pa.int32(),  # tokens of the prompt that the answers of a pair share
        "is_equal": pa.bool_(),  # a pair of equal answers
        "key": pa.uint64(),  # hash of the ids
        "row_length": pa.int32(),
        "row_turns": pa.int32(),
        "row_key": pa.uint64(),
        "row_form": pa.string(),
        # Only in a row's first example.
        "not_used": pa.list_(pa.string()),
        "notes": pa.list_(pa.string()),
        "fault": pa.string(),
        "lost": pa.list_(pa.string()),  # characters without a token
        "n_answer_characters": pa.int64(),
        "n_answer_lost": pa.int64(),
    }
)


def to_records(rows: Iterable[EncodedRow]) -> pa.RecordBatch:
    """Convert the examples of the rows to records, in order."""
    records: list[dict[str, Any]] = []
    for row in rows:
        once: dict[str, Any] = {"not_used": row.not_used, "notes": row.notes, "fault": row.fault or None}
        lost = row.lost
        once |= {
            "lost": lost.characters, "n_answer_characters": lost.n_answer, "n_answer_lost": lost.n_answer_lost
        }  # fmt: skip
        for example in row.examples:
            ids = np.array(example.input_ids, dtype=np.int32)
            learned = np.array(example.labels, dtype=np.int32) != IGNORED
            record = {name: getattr(example, name) for name in (*_COPIED, "stop_tokens")}
            record["segments"] = list(chain.from_iterable(example.segments))
            record["spans"] = [n for first, end, kind in example.spans for n in (first, end, KINDS.index(kind))]
            ends = [sum(example.segments[i][0] for i in path) for path in paths(example.segments)] or [len(ids)]
            record |= {"n_paths": len(ends), "longest_path": max(ends)}
            record |= {"tokens": np.where(learned, ids, ~ids), "length": len(ids), "key": key_of(example.input_ids)}
            record |= {"n_trained": int(learned[1:].sum()), "row_length": row.length, "row_turns": row.n_turns}
            record |= {"n_shared": example.segments[0][0] if example.is_pair and example.segments else 0}
            record |= {"is_equal": _is_equal(example)}
            records.append(record | once | {"row_key": row.key, "row_form": row.prompt_form})
            once = {"not_used": (), "notes": (), "fault": None, "lost": ()}
            once |= {"n_answer_characters": 0, "n_answer_lost": 0}
    columns = {name: [record[name] for record in records] for name in _SCHEMA.names}
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)


def _is_equal(example: Example) -> bool:
    if not example.is_pair or not example.segments or example.is_desirable is not None:
        return False
    (n_root, _), (n_chosen, _), _rejected = example.segments
    return example.input_ids[n_root : n_root + n_chosen] == example.input_ids[n_root + n_chosen :]


def write_records(batches: Iterable[pa.RecordBatch], file: Path) -> None:
    """Write records to an Arrow file one batch at a time, as the iterator yields them."""
    with pa.ipc.new_file(str(file), _SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def map_records(file: Path) -> list[pa.RecordBatch]:
    """Memory-map the records of a file: the system reads pages on access and may drop them when memory is short."""
    return list(pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_batches())


class Examples(Sequence[Example]):
    """A sequence of examples backed by Arrow records; each `Example` is built on access."""

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        index: NDArray[np.int64] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        """Args:
        batches: the records.
        index: which records, in which order, `(len,) int64`, counted across all batches; None for all of them.
        rows: their row numbers, `(len,) int64`; None for those in the records.
        """
        self._batches = batches
        self._ends = np.cumsum([batch.num_rows for batch in batches])
        self._index = np.arange(self._ends[-1]) if index is None else index
        self._rows = self._numbers("row") if rows is None else rows

    @classmethod
    def join(cls, parts: Sequence[Examples], order: NDArray[np.int64], rows: NDArray[np.int64]) -> Examples:
        """Examples of several sequences, in any order and with new row numbers.

        Args:
            parts: the sequences.
            order: which examples, `(len,) int64`, counted across all parts.
            rows: their row numbers, `(len,) int64`.
        """
        sizes = [int(part._ends[-1]) for part in parts]
        index = np.concatenate([part._index + sum(sizes[:k]) for k, part in enumerate(parts)])
        return cls([batch for part in parts for batch in part._batches], index[order], rows)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> Examples: ...

    def __getitem__(self, at: int | slice) -> Example | Examples:
        if isinstance(at, slice):
            return Examples(self._batches, self._index[at], self._rows[at])
        place = int(self._index[at])
        number = int(np.searchsorted(self._ends, place, side="right"))
        batch = self._batches[number]
        record = place - int(self._ends[number]) + batch.num_rows
        tokens = batch.column("tokens")[record].values.to_numpy()
        pairs = batch.column("segments")[record].values.to_numpy().reshape(-1, 2).tolist()
        triples = batch.column("spans")[record].values.to_numpy().reshape(-1, 3).tolist()
        return Example(
            input_ids=np.where(tokens < 0, ~tokens, tokens).tolist(),
            labels=np.where(tokens < 0, IGNORED, tokens).tolist(),
            stop_tokens=tuple(batch.column("stop_tokens")[record].as_py()),
            segments=tuple((length, parent) for length, parent in pairs),
            spans=tuple((first, end, KINDS[kind]) for first, end, kind in triples),
            **{name: batch.column(name)[record].as_py() for name in _COPIED if name != "row"},
            row=int(self._rows[at]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def take(self, chosen: NDArray[Any]) -> Examples:
        """A subset of the examples, chosen by indices or by a boolean mask `(len,)`."""
        return Examples(self._batches, self._index[chosen], self._rows[chosen])

    def column(self, name: str) -> NDArray[Any]:
        """One column of numbers, `(len,)`; this reads no tokens."""
        return self._rows if name == "row" else self._numbers(name)

    def _numbers(self, name: str) -> NDArray[Any]:
        return np.asarray(self._column(name).to_numpy()[self._index])

    def is_null(self, name: str) -> NDArray[np.bool_]:
        """Which examples have nothing in a column, `(len,)`."""
        return np.asarray(self._column(name).is_null().to_numpy()[self._index])

    def counts(self, name: str) -> dict[str, int]:
        """How many examples have each value in a column of lists, the most frequent first."""
        values = self._column(name).take(pa.array(self._index))
        counted = pa.compute.value_counts(pa.compute.list_flatten(values)).to_pylist()
        return {entry["values"]: entry["counts"] for entry in sorted(counted, key=lambda entry: -entry["counts"])}

    def learned_by_kind(self) -> dict[str, int]:
        """How many learned tokens there are of each kind; the first token of a sequence is never predicted."""
        values = self._column("spans").take(pa.array(self._index))
        first, end, kind = pa.compute.list_flatten(values).to_numpy().reshape(-1, 3).T
        counts = np.bincount(kind, weights=end - np.maximum(first, 1), minlength=len(KINDS))
        return {name: int(count) for name, count in zip(KINDS, counts, strict=True) if count}

    def distinct(self, name: str) -> list[Any]:
        """The distinct values of a column, or of the lists in it, in order of first appearance."""
        values = self._column(name).take(pa.array(self._index))
        values = pa.compute.list_flatten(values) if pa.types.is_list(values.type) else values
        return list(pa.compute.unique(values).to_pylist())

    def _column(self, name: str) -> Any:
        return pa.chunked_array([batch.column(name) for batch in self._batches], _SCHEMA.field(name).type)
