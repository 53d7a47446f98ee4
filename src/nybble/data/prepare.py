"""Rows to examples, counted: the ledger says what will be learned before anything is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.data.encode_all import Encoder, encode_rows
from nybble.data.ledger import Ledger, count_rows, first_of_rows
from nybble.data.rows import Rows, read_rows
from nybble.data.shapes import detect_shape
from nybble.data.store import Examples
from nybble.data.templates import find_template
from nybble.errors import RowsError
from nybble.recipe import DataSection, EvaluationSection, QuantizationSection
from nybble.run.record import Observer, Silent
from nybble.storage.cache import Cache


@dataclass(frozen=True)
class Prepared:
    """Everything the training and its evaluation take from the rows."""

    train: Examples
    held_out: Examples
    ledger: Ledger
    fingerprint: str  # SHA-256 over all rows
    dropped: Examples  # of rows that are used for neither
    fault: str | None  # why nothing useful would be learned

    def calibration_rows(self, most: int) -> list[list[int]]:
        """Token ids of at most so many trained rows, evenly spaced: files are often sorted by kind."""
        step = max(1, len(self.train) // most)
        return [example.input_ids for example in self.train[::step][:most]]


def prepare_rows(
    data: DataSection,
    evaluation: EvaluationSection,
    tokenizer: Any,
    seed: int,
    cache: Cache | None = None,
    watch: Observer | None = None,
) -> Prepared:
    """Read, split, encode and count; what is tokenized is kept in `cache`.

    Sets the tokenizer's chat template when the recipe names one.

    Raises:
        RowsError: rows or a row cannot be used, nothing would be learned, or no end token would.
    """
    prepared = examine_rows(data, evaluation, tokenizer, seed, cache, watch)
    if prepared.fault:
        raise RowsError(prepared.fault)
    return prepared


def examine_rows(
    data: DataSection,
    evaluation: EvaluationSection,
    tokenizer: Any,
    seed: int,
    cache: Cache | None = None,
    watch: Observer | None = None,
) -> Prepared:
    """As `prepare_rows`, but rows of which nothing useful would be learned are handed on with their `fault`."""
    if data.chat_template is not None:
        tokenizer.chat_template = find_template(data.chat_template)

    def encode(rows: Rows) -> Examples:
        encoder = Encoder(tokenizer, detect_shape(rows, data), data, evaluation.answer_field)
        return encode_rows(rows, encoder, cache, watch or Silent())

    rows = read_rows(data.dataset_name, data.dataset_split, data.max_train_rows, data.dataset_config)
    apart = _rows_apart(data, evaluation)
    other = encode(apart) if apart is not None else None  # the few rows first: their faults show at once
    read = encode(rows)
    useful = _useful(read)
    if other is not None:
        held, held_useful, chosen = other, _useful(other), np.zeros_like(useful)
    else:
        drawn_by = seed if data.eval_seed is None else data.eval_seed
        chosen = _hold_out(len(rows), data.eval_fraction, drawn_by, evaluation.max_eval_rows)
        held, held_useful = _of_rows(read, chosen), useful
    leaks = np.logical_or.reduceat(np.isin(read.column("key"), held.column("key")), first_of_rows(read))
    used = useful & ~leaks
    neither = ~used & ~(chosen & useful)
    held = _of_rows(held, held_useful)
    is_used = used[read.column("row") - 1]
    ledger = count_rows(read, is_used, len(np.unique(held.column("row"))), data.max_length, detect_shape(rows, data))
    ledger = replace(ledger, rows_dropped=int(neither.sum()))
    fingerprint = rows.fingerprint if apart is None else f"{rows.fingerprint}+{apart.fingerprint}"
    fault = _fault(ledger, rows.source, data)
    return Prepared(read.take(is_used), held, ledger, fingerprint, _of_rows(read, neither), fault)


def _rows_apart(data: DataSection, evaluation: EvaluationSection) -> Rows | None:
    """Held-out rows of their own: another file or set, or another split of the same."""
    name = data.eval_dataset_name or (data.dataset_name if data.eval_dataset_split else None)
    if name is None:
        return None
    if data.eval_dataset_name is None and Path(name).expanduser().is_file():
        raise RowsError(f"{name} is one file and has no splits; leave out --eval_dataset_split, or give a folder")
    config = data.dataset_config if name == data.dataset_name else None
    return read_rows(name, data.eval_dataset_split or data.dataset_split, evaluation.max_eval_rows, config)


def _useful(read: Examples) -> NDArray[np.bool_]:
    """Whether a token of it is learned, `(rows,)`."""
    return np.logical_or.reduceat(read.column("n_trained") > 0, first_of_rows(read))


def _of_rows(read: Examples, is_wanted: NDArray[np.bool_]) -> Examples:
    """The examples of the rows where `is_wanted`, `(rows,)`, is true."""
    return read.take(is_wanted[read.column("row") - 1])


def _hold_out(n_rows: int, fraction: float, seed: int, most: int) -> NDArray[np.bool_]:
    """Which rows are drawn by the seed, `(n_rows,)`; at least one where a share is asked for at all."""
    chosen = np.zeros(n_rows, bool)
    if fraction > 0 and n_rows > 1:
        wanted = min(most, max(1, round(fraction * n_rows)), n_rows - 1)
        chosen[random.Random(seed).sample(range(n_rows), wanted)] = True
    return chosen


def _fault(ledger: Ledger, source: str, data: DataSection) -> str | None:
    """Why a run on these rows would be of no use, and what to do."""
    if ledger.rows_used == 0 and ledger.rows_held_out > 0:
        return (
            f"{source}: every row is held out, or the same as one that is; lower --eval_fraction, or "
            "give other held-out rows"
        )
    if ledger.tokens_trained == 0:
        return (
            f"{source}: none of {ledger.rows_read} rows has a token to learn within max_length {data.max_length}; "
            "raise --max_length, or look at the rows"
        )
    if ledger.stop_tokens_trained == 0 and not data.allow_no_stop:
        return (
            f"{source}: no answer keeps its end token within max_length {data.max_length}, so the model would never "
            "learn to stop; raise --max_length, or set --allow_no_stop"
        )
    return None


def rows_cache(section: QuantizationSection) -> Cache | None:
    """Where tokenized rows are kept, if they are; packed bases lie beside them under the same limit."""
    return Cache("rows", section.cache_limit) if section.cache else None
