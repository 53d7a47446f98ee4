"""Rows to examples, counted: the ledger says what will be learned before anything is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.encode import EncodedRow, Example, encode_row
from nybble.data.ledger import Ledger, count_rows
from nybble.data.rows import Rows, read_rows
from nybble.data.shapes import Form, Turn, detect_shape, prompt_form, to_form
from nybble.data.templates import find_template
from nybble.errors import RowsError
from nybble.recipe import DataSection, EvaluationSection


@dataclass(frozen=True)
class Prepared:
    """Everything the training and its evaluation take from the rows."""

    train: list[Example]
    held_out: list[Example]
    ledger: Ledger
    fingerprint: str  # SHA-256 over all rows
    dropped: list[Example]  # of rows that are used for neither
    fault: str | None  # why nothing useful would be learned

    def spread(self, most: int) -> list[list[int]]:
        """Token ids of at most so many rows to train on, evenly spaced: files are often sorted by kind."""
        step = max(1, len(self.train) // most)
        return [example.input_ids for example in self.train[::step][:most]]


def prepare_rows(data: DataSection, evaluation: EvaluationSection, tokenizer: Any, seed: int) -> Prepared:
    """Read, split, encode and count.

    Sets the tokenizer's chat template when the recipe names one.

    Raises:
        RowsError: rows or a row cannot be used, nothing would be learned, or no end token would.
    """
    prepared = examine_rows(data, evaluation, tokenizer, seed)
    if prepared.fault:
        raise RowsError(prepared.fault)
    return prepared


def examine_rows(data: DataSection, evaluation: EvaluationSection, tokenizer: Any, seed: int) -> Prepared:
    """As `prepare_rows`, but rows of which nothing useful would be learned are handed on with their `fault`."""
    if data.chat_template is not None:
        tokenizer.chat_template = find_template(data.chat_template)
    rows = read_rows(data.dataset_name, data.dataset_split, data.max_train_rows)
    shape = detect_shape(rows, data)
    forms = _forms(rows, shape, data, tokenizer)
    read = list(_encode_all(rows, forms, data, evaluation, tokenizer))
    fingerprint = rows.fingerprint()
    if data.eval_dataset_name:
        held_rows = read_rows(data.eval_dataset_name, data.dataset_split, evaluation.max_eval_rows)
        held_forms = _forms(held_rows, detect_shape(held_rows, data), data, tokenizer)
        held = list(_encode_all(held_rows, held_forms, data, evaluation, tokenizer))
        fingerprint = f"{fingerprint}+{held_rows.fingerprint()}"
    else:
        drawn_by = seed if data.eval_seed is None else data.eval_seed
        held = _hold_out(read, data.eval_fraction, drawn_by, evaluation.max_eval_rows)
    held_ids = _ids(held)
    used = [row for row in read if _is_useful(row) and held_ids.isdisjoint(_ids([row]))]
    held = [row for row in held if _is_useful(row)]
    words = (shape, prompt_form(shape, forms, bool(tokenizer.chat_template)))
    ledger = count_rows(read, used, len(held), data.max_length, words)
    taken = {id(row) for row in (*used, *held)}
    neither = [row for row in read if id(row) not in taken]
    ledger = replace(ledger, rows_dropped=len(neither))
    train, held_out, dropped = ([e for row in group for e in row.examples] for group in (used, held, neither))
    return Prepared(train, held_out, ledger, fingerprint, dropped, _fault(ledger, rows.source, data))


def _is_useful(row: EncodedRow) -> bool:
    return any(example.n_trained for example in row.examples)


def _ids(rows: Sequence[EncodedRow]) -> set[tuple[int, ...]]:
    return {tuple(example.input_ids) for row in rows for example in row.examples}


def _forms(rows: Rows, shape: str, data: DataSection, tokenizer: Any) -> list[Form]:
    has_template = bool(tokenizer.chat_template)
    forms = [to_form(row, shape, data, rows.where(i), has_template) for i, row in enumerate(rows.rows)]
    if not has_template and any(isinstance(part, Turn) for form in forms for part in form):
        raise RowsError(
            f"{rows.source}: {shape} rows need a chat template and this tokenizer has none; "
            "set --chat_template inst, chatml or a .jinja file"
        )
    return forms


def _encode_all(
    rows: Rows, forms: list[Form], data: DataSection, evaluation: EvaluationSection, tokenizer: Any
) -> Iterator[EncodedRow]:
    for index, (row, form) in enumerate(zip(rows.rows, forms, strict=True)):
        encoded = encode_row(form, tokenizer, data.max_length, data.loss_on, data.overlong, rows.where(index))
        answer = row.get(evaluation.answer_field)
        answer = answer if isinstance(answer, str) else None
        examples = [replace(example, row=index + 1, answer=answer) for example in encoded.examples]
        yield replace(encoded, examples=examples)


def _hold_out(read: list[EncodedRow], fraction: float, seed: int, most: int) -> list[EncodedRow]:
    """A share of the rows, drawn by the seed; at least one where a share is asked for at all."""
    if fraction == 0 or len(read) < 2:
        return []
    wanted = min(most, max(1, round(fraction * len(read))), len(read) - 1)
    chosen = random.Random(seed).sample(range(len(read)), wanted)
    return [read[i] for i in sorted(chosen)]


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
