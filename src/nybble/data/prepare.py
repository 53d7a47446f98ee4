"""Read, encode and split the rows, and count in a ledger what will be learned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.data.encode_all import Encoder, encode_rows
from nybble.data.ledger import Ledger, count_rows, first_of_rows
from nybble.data.mixture import mix_sets
from nybble.data.preferences import layout_of
from nybble.data.rows import Rows, read_rows
from nybble.data.store import Examples
from nybble.data.templates import find_template
from nybble.data.tree import path_before, unfold
from nybble.errors import RowsError
from nybble.recipe import DataSection, DataSet, EvaluationSection, QuantizationSection
from nybble.run.record import Observer, Silent
from nybble.storage.cache import Cache

_MOST_LOST = 0.01  # share of the characters of the answers


@dataclass(frozen=True)
class Prepared:
    """The examples for training and evaluation, and their counts."""

    train: Examples
    held_out: Examples
    ledger: Ledger
    fingerprint: str  # SHA-256 of all rows
    dropped: Examples  # of rows that are neither trained on nor held out
    fault: str | None  # why nothing useful would be learned; None if all is well

    def calibration_rows(self, most: int) -> list[list[int]]:
        """Token ids of at most `most` training examples, evenly spaced because files are often sorted by kind.

        Of a tree it is the last context, of a pair the one with the chosen answer.
        """
        step = max(1, len(self.train) // most)
        return [
            unfold(e.input_ids, e.labels, e.segments)[0][0]
            if e.is_pair
            else path_before(e.input_ids, e.segments, len(e.input_ids))
            for e in self.train[::step][:most]
        ]


def prepare_rows(
    data: DataSection,
    evaluation: EvaluationSection,
    tokenizer: Any,
    seed: int,
    cache: Cache | None = None,
    watch: Observer | None = None,
    objective: str = "sft",
) -> Prepared:
    """Read, encode, split and count the rows; tokenized rows are stored in `cache`.

    This sets the tokenizer's chat template if the recipe names one.

    Raises:
        RowsError: the rows cannot be used, nothing would be learned, or no end token would be learned.
    """
    prepared = examine_rows(data, evaluation, tokenizer, seed, cache, watch, objective)
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
    objective: str = "sft",
) -> Prepared:
    """Like `prepare_rows`, but if nothing useful would be learned, return the rows with the reason in `fault`."""
    if data.chat_template is not None:
        tokenizer.chat_template = find_template(data.chat_template)

    def encode(rows: Rows, own: DataSection) -> Examples:
        layout = layout_of(rows, own, objective)
        encoder = Encoder(tokenizer, layout, own, evaluation.answer_field, objective)
        return encode_rows(rows, encoder, cache, watch or Silent())

    sets = [
        read_rows(part.path, part.split or "train", part.rows or data.max_train_rows, part.config, data.on_bad_row)
        for part in data.sets
    ]
    sections = [data.of_set(part) for part in data.sets]
    eval_rows = _read_eval_rows(data, evaluation)
    # The held-out rows are few, so they are encoded first: their faults show at once.
    eval_examples = encode(eval_rows, data) if eval_rows is not None else None
    mixture = mix_sets(data.sets, sets, [encode(rows, own) for rows, own in zip(sets, sections, strict=True)])
    read = mixture.examples
    useful = _useful(read)
    if eval_examples is not None:
        held_out = eval_examples
        held_out_useful = _useful(eval_examples)
        is_held_out = np.zeros_like(useful)
    else:
        eval_seed = seed if data.eval_seed is None else data.eval_seed
        is_held_out = _hold_out(len(useful), data.eval_fraction, eval_seed, evaluation.max_eval_rows)
        held_out = _of_rows(read, is_held_out)
        held_out_useful = useful
    leaks = np.logical_or.reduceat(np.isin(read.column("key"), held_out.column("key")), first_of_rows(read))
    used = useful & ~leaks
    is_good = read.take(first_of_rows(read)).is_null("fault")
    dropped = is_good & ~used & ~(is_held_out & useful)
    held_out = _of_rows(held_out, held_out_useful)
    is_used = used[read.column("row") - 1]
    shapes = [layout_of(rows, own, objective).shape for rows, own in zip(sets, sections, strict=True)]

    def count(is_counted: NDArray[np.bool_], shape: str) -> Ledger:
        """The ledger of those rows for which `is_counted`, `(rows,)`, is true."""
        of_rows = is_counted[read.column("row") - 1]
        held = np.unique(held_out.column("row"))
        n_held_out = len(held) if eval_examples is not None else int(is_counted[held - 1].sum())
        ledger = count_rows(read.take(of_rows), is_used[of_rows], n_held_out, data.max_length, shape)
        return replace(ledger, rows_dropped=int((dropped & is_counted).sum()))

    ledger = count(np.ones_like(useful), " + ".join(dict.fromkeys(shapes)))
    parts = zip(_names_of(data.sets), shapes, strict=True)
    several = {name: count(mixture.set_of_row == k, shape) for k, (name, shape) in enumerate(parts)}
    ledger = replace(
        ledger,
        files_not_read=tuple(file for rows in sets for file in rows.files_not_read),
        sets=several if len(sets) > 1 else {},
    )
    fingerprint = mixture.fingerprint
    return Prepared(
        train=read.take(is_used),
        held_out=held_out,
        ledger=ledger,
        fingerprint=fingerprint if eval_rows is None else f"{fingerprint}+{eval_rows.fingerprint}",
        dropped=_of_rows(read, dropped),
        fault=_fault(ledger, data.source, data),
    )


def _names_of(sets: Sequence[DataSet]) -> list[str]:
    """A name for each set: its path, with a number where several sets have one."""
    paths = [part.path for part in sets]
    return [
        path if paths.count(path) == 1 else f"{path} ({paths[: k + 1].count(path)})" for k, path in enumerate(paths)
    ]


def _read_eval_rows(data: DataSection, evaluation: EvaluationSection) -> Rows | None:
    """The held-out rows of a separate file, data set or split, if the recipe names one."""
    name = data.eval_dataset_name or (data.source if data.eval_dataset_split else None)
    if name is None:
        return None
    if data.eval_dataset_name is None and Path(name).expanduser().is_file():
        raise RowsError(f"{name} is one file and has no splits; remove --eval_dataset_split, or give a folder")
    config = data.dataset_config if name == data.dataset_name else None
    return read_rows(
        name, data.eval_dataset_split or data.dataset_split, evaluation.max_eval_rows, config, data.on_bad_row
    )


def _useful(read: Examples) -> NDArray[np.bool_]:
    """Whether at least one token of each row is learned, `(rows,)`."""
    return np.logical_or.reduceat(read.column("n_trained") > 0, first_of_rows(read))


def _of_rows(read: Examples, is_wanted: NDArray[np.bool_]) -> Examples:
    """The examples of those rows for which `is_wanted`, `(rows,)`, is true."""
    return read.take(is_wanted[read.column("row") - 1])


def _hold_out(n_rows: int, fraction: float, seed: int, most: int) -> NDArray[np.bool_]:
    """Which rows are held out, `(n_rows,)`, drawn at random; at least one if `fraction` is above 0."""
    chosen = np.zeros(n_rows, bool)
    if fraction > 0 and n_rows > 1:
        wanted = min(most, max(1, round(fraction * n_rows)), n_rows - 1)
        chosen[random.Random(seed).sample(range(n_rows), wanted)] = True
    return chosen


def _fault(ledger: Ledger, source: str, data: DataSection) -> str | None:
    """Why a run on these rows would be useless, and what to do about it; None if it would be useful."""
    if ledger.rows_skipped == ledger.rows_read:
        return f"{source}: none of the {ledger.rows_read:,} rows can be used; the first: {ledger.skipped[0]}"
    if ledger.rows_used == 0 and ledger.rows_held_out > 0:
        return (
            f"{source}: every row is held out or equal to a held-out row; lower --eval_fraction, or give different "
            "held-out rows"
        )
    if ledger.tokens_trained == 0:
        return (
            f"{source}: none of the {ledger.rows_read} rows has a token to learn within max_length {data.max_length}; "
            "raise --max_length, or check the rows"
        )
    if ledger.stop_tokens_trained == 0 and not data.allow_no_stop:
        return (
            f"{source}: no answer keeps its end token within max_length {data.max_length}, so the model would never "
            "learn to stop; raise --max_length, or set --allow_no_stop"
        )
    lost = ledger.answer_characters_lost / max(ledger.answer_characters, 1)
    if lost > _MOST_LOST and not data.allow_lost_characters:
        named = " ".join(list(ledger.characters_lost)[:5])
        return (
            f"{source}: the tokenizer has no token for {100 * lost:.1f} % of the characters of the answers (such as "
            f"{named}), so the model would learn text without them; give a model whose tokenizer has them, replace "
            "them in the rows, or set --allow_lost_characters"
        )
    return None


def rows_cache(section: QuantizationSection) -> Cache | None:
    """The cache of tokenized rows, or None if caching is off; packed base models share its size limit."""
    return Cache("rows", section.cache_limit) if section.cache else None
