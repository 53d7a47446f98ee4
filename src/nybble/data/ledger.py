"""The ledger: counts of the rows and of the tokens that are learned, taken before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nybble.data.store import Examples

_MOST_NAMES = 50  # of columns that are not used
_MOST_NAMED = 10  # rows that are skipped and named
_MOST_SHOWN = 5  # characters that are lost and named


@dataclass(frozen=True)
class PreferenceCounts:
    """Counts of compared or rated answers, in the rows that are trained on unless it says otherwise."""

    pairs: int = 0
    pairs_equal: int = 0  # both answers have the same tokens, so neither can be preferred
    pairs_cut_on_one_side: int = 0
    pairs_cut_on_both_sides: int = 0
    pairs_lost: int = 0  # rows read of which an answer lies wholly beyond max_length, so they are dropped
    chosen_tokens_mean: float = 0.0  # before truncation
    rejected_tokens_mean: float = 0.0
    chosen_longer_fraction: float = 0.0  # of the pairs; far from a half, length alone tells the answers apart
    tokens_shared: int = 0  # of prompts, computed once for two answers
    good_answers: int = 0  # of rated ones
    bad_answers: int = 0

    @property
    def in_words(self) -> list[str]:
        """The lines of the ledger about them."""
        if not self.pairs:
            return [f"{self.good_answers:,} good and {self.bad_answers:,} bad answers"]
        lines = [
            f"{self.pairs:,} pairs: chosen answers have {self.chosen_tokens_mean:.0f} tokens on average, "
            f"rejected ones {self.rejected_tokens_mean:.0f}; in {100 * self.chosen_longer_fraction:.1f} % the "
            "chosen one is the longer"
        ]
        if self.pairs_cut_on_one_side or self.pairs_cut_on_both_sides:
            lines.append(
                f"{self.pairs_cut_on_one_side:,} pairs are cut on one side only, {self.pairs_cut_on_both_sides:,} on "
                "both"
            )
        if self.pairs_lost:
            lines.append(f"{self.pairs_lost:,} pairs are dropped because max_length leaves nothing of an answer")
        if self.pairs_equal:
            lines.append(f"{self.pairs_equal:,} pairs have equal answers, of which none can be preferred")
        return lines


@dataclass(frozen=True)
class Ledger:
    """Counts of rows, answers and tokens; answers and tokens are counted in the training rows after truncation."""

    shape: str
    prompt_form: str  # "template", "plain", "inst", "alpaca", or one of `rendered.CHAT_FORMATS`
    rows_read: int
    rows_used: int
    rows_dropped: int  # nothing to learn, too long with `overlong: drop`, or equal to a held-out row
    rows_held_out: int
    rows_over_max_length: int  # rows read that are too long before truncation, dropping or splitting
    rows_truncated: int  # rows used that were truncated
    rows_split: int  # rows used that became several examples
    rows_duplicate: int  # rows read that equal an earlier row
    rows_multi_turn: int  # rows read that have more than one answer
    examples: int  # examples of the rows used: one per row, several for a row that was split
    turns: int  # answers to learn
    stop_tokens_trained: int  # end-of-turn tokens in the loss, at most one per answer
    stop_tokens: tuple[int, ...]  # distinct ids of those tokens; generation stops at them
    stop_tokens_cut: int  # end-of-turn tokens that max_length cut away
    stop_token_trained_fraction: float  # stop_tokens_trained / turns
    answers_empty: int
    tokens_total: int
    tokens_trained: int
    tokens_masked: int
    length_mean: float  # tokens per row; all lengths are of the rows read, before truncation
    length_p50: int
    length_p95: int
    length_p99: int  # the max_length that keeps 99 % of the rows whole
    length_max: int
    tokens_by_kind: dict[str, int] = field(default_factory=dict)  # tokens learned of each of `kinds.KINDS`
    rows_skipped: int = 0  # rows read that cannot be used, under `on_bad_row: skip`
    skipped: tuple[str, ...] = ()  # why the first ten of them cannot be used
    not_used: dict[str, int] = field(default_factory=dict)  # column or message key -> rows that hold something there
    notes: dict[str, int] = field(default_factory=dict)  # what was changed in rows -> number of rows
    files_not_read: tuple[str, ...] = ()  # files of the folder that are not read
    characters_lost: dict[str, int] = field(default_factory=dict)  # without a token -> rows read that hold it
    answer_characters: int = 0  # of the rows used, before truncation
    answer_characters_lost: int = 0  # those of them that the tokenizer has no token for
    context: int | None = None  # the most tokens that the model takes, if that is known
    sets: dict[str, Ledger] = field(default_factory=dict)  # the ledger of each set, if there are several
    preferences: PreferenceCounts | None = None  # of rows that are compared or rated

    @property
    def in_words(self) -> list[str]:
        """The lines that `nybble train` prints before the first step."""
        lines = [
            f"{self.rows_used:,} rows ({self.shape}) to train, {self.rows_held_out:,} held out, "
            f"{self.rows_truncated:,} cut, {self.rows_dropped:,} dropped",
            f"{self.tokens_trained:,} of {self.tokens_total:,} tokens are learned; "
            f"{100 * self.stop_token_trained_fraction:.1f} % of the answers keep their end token",
        ]
        if self.tokens_by_kind.keys() & {"reasoning", "call"}:
            lines.append("learned: " + ", ".join(f"{n:,} tokens of {kind}" for kind, n in self.tokens_by_kind.items()))
        lines += self.preferences.in_words if self.preferences else []
        for name, part in self.sets.items():
            share = part.tokens_trained / max(self.tokens_trained, 1)
            lines.append(f"{name}: {_rows(part.rows_used)} to train, {100 * share:.1f} % of the learned tokens")
        if self.not_used:
            names = [f"{name} in {_rows(rows)}" for name, rows in self.not_used.items()]
            lines.append(f"not used: {', '.join(names)}")
        lines += [f"{note} in {_rows(rows)}" for note, rows in self.notes.items()]
        if self.characters_lost:
            lines.append(
                f"the tokenizer has no token for {_named(self.characters_lost)}: {self.answer_characters_lost:,} of "
                f"{self.answer_characters:,} characters of the answers are lost"
            )
        if self.files_not_read:
            lines.append(f"files not read: {', '.join(self.files_not_read)}")
        if self.rows_skipped:
            lines.append(
                f"{self.rows_skipped:,} rows are skipped because they cannot be used; the first: {self.skipped[0]}"
            )
        if self.rows_over_max_length:
            fits = self.context is None or self.length_p99 <= self.context
            advice = f"max_length {self.length_p99:,} would keep 99 % whole"
            beyond = f"99 % have at most {self.length_p99:,} tokens, and the model takes {self.context or 0:,}"
            lines.append(
                f"{self.rows_over_max_length:,} rows are longer than max_length, {self.rows_split:,} were split; "
                f"{self.stop_tokens_cut:,} end tokens are lost; {advice if fits else beyond}"
            )
        if self.stop_tokens_trained == 0:
            lines.append("no end token is learned, as allow_no_stop permits: the model will not learn to stop")
        return lines


def _named(characters: Mapping[str, int]) -> str:
    """The first characters, each with the rows that hold it, and how many others there are."""
    first = ", ".join(f"{character!r} ({_rows(rows)})" for character, rows in list(characters.items())[:_MOST_SHOWN])
    others = len(characters) - _MOST_SHOWN
    return f"{first} and {others:,} other characters" if others > 0 else first


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def count_rows(read: Examples, is_used: NDArray[np.bool_], n_held_out: int, max_length: int, shape: str) -> Ledger:
    """Count rows and tokens.

    Args:
        read: the examples of all rows that were read.
        is_used: which of these examples are trained on, `(len(read),)`.
        n_held_out: the number of rows that are held out.
        max_length: limit in tokens for each example.
        shape: the shape of the rows.
    """
    used = read.take(is_used)
    rows = read.take(first_of_rows(read))
    faults = read.distinct("fault")
    good = rows.take(rows.is_null("fault"))
    lengths = np.sort(good.column("row_length")) if len(good) else np.zeros(1, np.int32)
    examples_of = np.unique(used.column("row"), return_counts=True)[1]
    turns = _sum(used, "n_answers")
    stops = _sum(used, "n_stops")
    total = _sum(used, "length")
    trained = _sum(used, "n_trained")
    return Ledger(
        shape=shape,
        prompt_form=next((form for form in read.distinct("row_form") if form), "plain"),
        rows_read=len(rows),
        rows_used=len(examples_of),
        rows_dropped=len(good) - len(examples_of),
        rows_held_out=n_held_out,
        rows_over_max_length=int((lengths > max_length).sum()),
        rows_truncated=len(np.unique(used.column("row")[used.column("is_truncated")])),
        rows_split=int((examples_of > 1).sum()) if used.is_null("is_desirable").all() else 0,
        rows_duplicate=len(good) - len(np.unique(good.column("row_key"))),
        rows_multi_turn=int((good.column("row_turns") > 1).sum()),
        examples=len(used),
        turns=turns,
        stop_tokens_trained=stops,
        stop_tokens=tuple(sorted(used.distinct("stop_tokens"))),
        stop_tokens_cut=_sum(used, "n_cut_stops"),
        stop_token_trained_fraction=stops / turns if turns else 0.0,
        answers_empty=_sum(used, "n_empty"),
        tokens_total=total,
        tokens_trained=trained,
        tokens_masked=total - trained,
        length_mean=float(lengths.mean()),
        length_p50=_percentile(lengths, 0.50),
        length_p95=_percentile(lengths, 0.95),
        length_p99=_percentile(lengths, 0.99),
        length_max=int(lengths[-1]),
        tokens_by_kind=used.learned_by_kind(),
        rows_skipped=len(rows) - len(good),
        skipped=tuple(fault for fault in faults if fault is not None)[:_MOST_NAMED],
        not_used=_most(read.counts("not_used")),
        notes=read.counts("notes"),
        characters_lost=read.counts("lost"),
        answer_characters=_sum(used, "n_answer_characters"),
        answer_characters_lost=_sum(used, "n_answer_lost"),
        preferences=_preferences(read, used),
    )


def _preferences(read: Examples, used: Examples) -> PreferenceCounts | None:
    is_rated = ~used.is_null("is_desirable")
    if is_rated.any():
        n_good = int(used.take(is_rated).column("is_desirable").astype(bool).sum())
        return PreferenceCounts(good_answers=n_good, bad_answers=int(is_rated.sum()) - n_good)
    if not read.column("is_pair").any():
        return None
    pairs = used.take(used.column("is_pair"))
    cut, n = pairs.column("n_cut_sides"), max(len(pairs), 1)
    chosen, rejected = pairs.column("n_chosen"), pairs.column("n_rejected")
    is_lost = read.column("is_pair") & (read.column("n_trained") == 0) & (read.column("n_cut_stops") > 0)
    return PreferenceCounts(
        pairs=len(pairs),
        pairs_equal=int(pairs.column("is_equal").sum()),
        pairs_cut_on_one_side=int((cut == 1).sum()),
        pairs_cut_on_both_sides=int((cut == 2).sum()),
        pairs_lost=int(is_lost.sum()),
        chosen_tokens_mean=int(chosen.sum()) / n,
        rejected_tokens_mean=int(rejected.sum()) / n,
        chosen_longer_fraction=int((chosen > rejected).sum()) / n,
        tokens_shared=_sum(pairs, "n_shared"),
    )


def _most(counts: dict[str, int]) -> dict[str, int]:
    """The most frequent names with their counts, and the number of all others together."""
    names = list(counts)[:_MOST_NAMES]
    others = sum(counts.values()) - sum(counts[name] for name in names)
    return {name: counts[name] for name in names} | ({"(others)": others} if others else {})


def first_of_rows(read: Examples) -> NDArray[np.intp]:
    """The index of each row's first example, `(rows,)`."""
    return np.flatnonzero(np.diff(read.column("row"), prepend=0))


def _sum(examples: Examples, name: str) -> int:
    return int(examples.column(name).sum(dtype=np.int64))


def _percentile(ordered: NDArray[np.int32], share: float) -> int:
    """The smallest length that at least `share` of the ascending lengths do not exceed."""
    return int(ordered[math.ceil(share * len(ordered)) - 1])
