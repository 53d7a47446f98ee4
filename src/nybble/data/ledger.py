"""The ledger: what the rows hold and how much of it is learned, counted before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.data.encode import EncodedRow, Example


@dataclass(frozen=True)
class Ledger:
    """Counts of rows, answers and tokens. Those of answers and tokens are of the rows trained on, as they are cut."""

    shape: str
    prompt_form: str  # how prompts are put: "template", "plain", "inst", "alpaca", or one of `rendered.FAMILIES`
    rows_read: int
    rows_used: int
    rows_dropped: int  # nothing to learn in them, too long under `overlong: drop`, or the same row is held out
    rows_held_out: int
    rows_over_max_length: int  # of the rows read, before anything was done about it
    rows_truncated: int  # of the rows used
    rows_split: int  # of the rows used, how many became several
    rows_duplicate: int  # of the rows read, how many say what an earlier one says
    rows_multi_turn: int  # of the rows read, how many hold more than one answer
    examples: int  # what the rows used became: one each, more where split
    turns: int  # answers that are to be learned
    stop_tokens_trained: int  # end-of-turn tokens in the loss, at most one an answer
    stop_tokens: tuple[int, ...]  # their ids; generation stops at them
    stop_tokens_cut: int  # end-of-turn tokens that max_length cut away
    stop_token_trained_fraction: float  # stop_tokens_trained / turns
    answers_empty: int
    tokens_total: int
    tokens_trained: int
    tokens_masked: int
    length_mean: float  # tokens a row; this and those below are of the rows read, before cutting
    length_p50: int
    length_p95: int
    length_p99: int  # the max_length that keeps 99 % of the rows whole
    length_max: int

    @property
    def in_words(self) -> list[str]:
        """What people should know before training."""
        lines = [
            f"{self.rows_used:,} rows ({self.shape}) to train, {self.rows_held_out:,} held out, "
            f"{self.rows_truncated:,} cut, {self.rows_dropped:,} dropped",
            f"{self.tokens_trained:,} of {self.tokens_total:,} tokens are learned; "
            f"{100 * self.stop_token_trained_fraction:.1f} % of the answers keep their end token",
        ]
        if self.rows_over_max_length:
            lines.append(
                f"{self.rows_over_max_length:,} rows are longer than max_length, {self.rows_split:,} were split; "
                f"{self.stop_tokens_cut:,} end tokens are lost; max_length {self.length_p99:,} keeps 99 % whole"
            )
        if self.stop_tokens_trained == 0:
            lines.append("no end token is learned, as allow_no_stop permits: the model will not learn to stop")
        return lines


def count_rows(
    read: Sequence[EncodedRow], used: Sequence[EncodedRow], n_held_out: int, max_length: int, words: tuple[str, str]
) -> Ledger:
    """The ledger of `used` out of `read`; `words` are shape and prompt form."""
    examples: list[Example] = [example for row in used for example in row.examples]
    lengths = sorted(row.length for row in read) or [0]
    turns, stops = sum(e.n_answers for e in examples), sum(e.n_stops for e in examples)
    total, trained = sum(len(e.input_ids) for e in examples), sum(e.n_trained for e in examples)
    return Ledger(
        shape=words[0],
        prompt_form=words[1],
        rows_read=len(read),
        rows_used=len(used),
        rows_dropped=len(read) - len(used),
        rows_held_out=n_held_out,
        rows_over_max_length=sum(length > max_length for length in lengths),
        rows_truncated=sum(any(e.is_truncated for e in row.examples) for row in used),
        rows_split=sum(len(row.examples) > 1 for row in used),
        rows_duplicate=len(read) - len({row.key for row in read}),
        rows_multi_turn=sum(row.n_turns > 1 for row in read),
        examples=len(examples),
        turns=turns,
        stop_tokens_trained=stops,
        stop_tokens=tuple(sorted({token for e in examples for token in e.stop_tokens})),
        stop_tokens_cut=sum(e.n_cut_stops for e in examples),
        stop_token_trained_fraction=stops / turns if turns else 0.0,
        answers_empty=sum(e.n_empty for e in examples),
        tokens_total=total,
        tokens_trained=trained,
        tokens_masked=total - trained,
        length_mean=sum(lengths) / len(lengths),
        length_p50=_percentile(lengths, 0.50),
        length_p95=_percentile(lengths, 0.95),
        length_p99=_percentile(lengths, 0.99),
        length_max=lengths[-1],
    )


def _percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest of the lengths that at least `share` of them do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]
