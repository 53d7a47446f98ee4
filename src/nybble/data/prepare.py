"""Rows to examples, counted: the ledger says what will be learned before anything is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any

from nybble.data.encode import Example, encode_row
from nybble.data.rows import Rows, read_rows
from nybble.data.shapes import Form, Turn, detect_shape, prompt_form, to_form
from nybble.data.templates import find_template
from nybble.errors import RowsError
from nybble.recipe import DataSection, EvaluationSection


@dataclass(frozen=True)
class Ledger:
    """What the training rows hold and how much of it is learned. Counts are of rows and tokens."""

    shape: str
    prompt_form: str  # how prompts are put: "template", "inst", "alpaca" or "plain"
    rows_read: int
    rows_used: int
    rows_dropped: int  # nothing to learn in them, or the same row is held out
    rows_truncated: int
    rows_held_out: int
    tokens_total: int
    tokens_trained: int
    stop_token_trained_fraction: float  # of the answers, how many end with a learned end-of-turn token
    length_mean: float
    length_p95: float
    length_max: int


@dataclass(frozen=True)
class Prepared:
    """Everything the training and its evaluation take from the rows."""

    train: list[Example]
    held_out: list[Example]
    ledger: Ledger
    fingerprint: str  # SHA-256 over all rows


def prepare_rows(data: DataSection, evaluation: EvaluationSection, tokenizer: Any, seed: int) -> Prepared:
    """Read, split, encode and count.

    Sets the tokenizer's chat template when the recipe names one.

    Raises:
        RowsError: rows or a row cannot be used, nothing would be learned, or no end token would.
    """
    if data.chat_template is not None:
        tokenizer.chat_template = find_template(data.chat_template)
    rows = read_rows(data.dataset_name, data.dataset_split, data.max_train_rows)
    shape = detect_shape(rows, data)
    forms = _forms(rows, shape, data, tokenizer)
    examples = list(_encode_all(rows, forms, data, evaluation, tokenizer))
    if data.eval_dataset_name:
        held_rows = read_rows(data.eval_dataset_name, data.dataset_split, evaluation.max_eval_rows)
        held_forms = _forms(held_rows, detect_shape(held_rows, data), data, tokenizer)
        held = list(_encode_all(held_rows, held_forms, data, evaluation, tokenizer))
        fingerprint = f"{rows.fingerprint()}+{held_rows.fingerprint()}"
    else:
        held = _hold_out(examples, data.eval_fraction, seed, evaluation.max_eval_rows)
        fingerprint = rows.fingerprint()
    seen = {tuple(example.input_ids) for example in held}
    train = [e for e in examples if e.n_trained and tuple(e.input_ids) not in seen]
    held = [e for e in held if e.n_trained]
    asked = prompt_form(shape, forms, bool(tokenizer.chat_template))
    from_same_file = 0 if data.eval_dataset_name else len(held)
    ledger = _count(examples, train, len(held), shape, asked)
    ledger = replace(ledger, rows_dropped=len(examples) - len(train) - from_same_file)
    _refuse_useless(ledger, rows.source, data)
    return Prepared(train, held, ledger, fingerprint)


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
) -> Iterator[Example]:
    for index, (row, form) in enumerate(zip(rows.rows, forms, strict=True)):
        example = encode_row(form, tokenizer, data.max_length, data.loss_on, rows.where(index))
        answer = row.get(evaluation.answer_field)
        yield replace(example, answer=answer) if isinstance(answer, str) else example


def _hold_out(examples: list[Example], fraction: float, seed: int, most: int) -> list[Example]:
    """A share of the examples, drawn by the seed; at least one where a share is asked for at all."""
    if fraction == 0 or len(examples) < 2:
        return []
    wanted = min(most, max(1, round(fraction * len(examples))), len(examples) - 1)
    chosen = random.Random(seed).sample(range(len(examples)), wanted)
    return [examples[i] for i in sorted(chosen)]


def _count(examples: list[Example], train: list[Example], n_held: int, shape: str, asked: str) -> Ledger:
    lengths = [len(example.input_ids) for example in train] or [0]
    answers = sum(example.n_answers for example in train)
    return Ledger(
        shape=shape,
        prompt_form=asked,
        rows_read=len(examples),
        rows_used=len(train),
        rows_dropped=len(examples) - len(train),
        rows_truncated=sum(example.is_truncated for example in train),
        rows_held_out=n_held,
        tokens_total=sum(lengths),
        tokens_trained=sum(example.n_trained for example in train),
        stop_token_trained_fraction=sum(example.n_stops for example in train) / answers if answers else 0.0,
        length_mean=sum(lengths) / len(lengths),
        length_p95=quantiles(lengths, n=20, method="inclusive")[-1] if len(lengths) > 1 else float(lengths[0]),
        length_max=max(lengths),
    )


def _refuse_useless(ledger: Ledger, source: str, data: DataSection) -> None:
    if ledger.rows_used == 0 and ledger.rows_held_out > 0:
        raise RowsError(
            f"{source}: every row is held out, or the same as one that is; lower --eval_fraction, or "
            "give other held-out rows"
        )
    if ledger.tokens_trained == 0:
        raise RowsError(
            f"{source}: none of {ledger.rows_read} rows has a token to learn within max_length {data.max_length}; "
            "raise --max_length, or look at the rows"
        )
    if ledger.stop_token_trained_fraction == 0:
        raise RowsError(
            f"{source}: no answer keeps its end token within max_length {data.max_length}, so the model would never "
            "learn to stop; raise --max_length"
        )
