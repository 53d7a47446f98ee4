"""Answers that are compared or rated, as examples.

Two compared answers are one example, a tree (`nybble.data.tree`): the prompt, once, and the two answers behind it, the
chosen one first. The tree branches where the tokens of the prompt end, wherever the answers begin alike, so each
answer is one segment, and its log-probability the sum over its learned tokens. A rated answer is an example as in
supervised rows, with its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from nybble.data.contexts import Context
from nybble.data.encode import EncodedRow, Example, contexts_of, encode_row, key_of
from nybble.data.kinds import Span
from nybble.data.shapes import Form, answers_of, prompt_form_of
from nybble.data.tokens import IGNORED
from nybble.data.tree import n_shared
from nybble.errors import RowsError
from nybble.recipe import DataSection

_SEVERAL_CONTEXTS = (
    "the chat template rewrites earlier turns, so an answer of several turns has several contexts; set --loss_on "
    "last_answer"
)


def encode_pair(forms: tuple[Form, Form], tokenizer: Any, data: DataSection, where: str) -> EncodedRow:
    """A prompt with the answer that is chosen and the one that is rejected.

    Args:
        forms: the row with the one and with the other; both begin with the prompt.
        tokenizer: a fast tokenizer of transformers.
        data: its settings of the same names decide as for single answers.
        where: the row's place, which starts each error message.

    Raises:
        RowsError: as `encode_row`; or an answer of several turns has no single context.
    """
    chosen, notes = _context_of(forms[0], tokenizer, data, where)
    rejected, _notes = _context_of(forms[1], tokenizer, data, where)
    return EncodedRow(
        [_tree((chosen, rejected), data, where)],
        length=max(len(chosen.ids), len(rejected.ids)),
        n_turns=len(answers_of(forms[0])),
        key=key_of([*chosen.ids, IGNORED, *rejected.ids]),
        prompt_form=prompt_form_of(forms[0]),
        notes=notes,
    )


def encode_rated(answers: Sequence[tuple[Form, bool]], tokenizer: Any, data: DataSection, where: str) -> EncodedRow:
    """The answers of a row, each an example that says whether it is good; of a pair, those with a token to learn.

    Raises:
        RowsError: as `encode_pair`; or an answer has no prompt.
    """
    examples: list[Example] = []
    encoded: list[EncodedRow] = []
    for form, is_desirable in answers:
        row = encode_row(form, tokenizer, data.max_length, data.loss_on, data.overlong, data.reasoning, where)
        if len(row.examples) > 1 or row.examples[0].segments:
            raise RowsError(f"{where}: {_SEVERAL_CONTEXTS}")
        if row.examples[0].labels[:1] not in ([], [IGNORED]):
            raise RowsError(f"{where}: no token of a prompt precedes its answer; give it a prompt")
        encoded.append(row)
        examples.append(replace(row.examples[0], is_desirable=is_desirable))
    return replace(
        encoded[0],
        examples=[example for example in examples if example.n_trained] or examples[:1],
        length=max(row.length for row in encoded),
        key=key_of([row.key >> 33 for row in encoded] + [int(is_desirable) for _form, is_desirable in answers]),
    )


def _context_of(form: Form, tokenizer: Any, data: DataSection, where: str) -> tuple[Context, tuple[str, ...]]:
    contexts, notes = contexts_of(form, tokenizer, data.loss_on, data.reasoning, where)
    if len(contexts) != 1:
        raise RowsError(f"{where}: {_SEVERAL_CONTEXTS}")
    if not contexts[0].answers:
        raise RowsError(f"{where}: nothing of an answer is learned; repair the row")
    return contexts[0], notes


def _tree(sides: tuple[Context, Context], data: DataSection, where: str) -> Example:
    """Two contexts as one example, each cut at `max_length`; without anything to learn if one of them loses it all."""
    n_root = n_shared(*(side.ids[: side.answers[0].first] for side in sides))
    if n_root == 0:
        raise RowsError(f"{where}: its answers have no token of a prompt in common; give both one prompt")
    lengths = [len(side.ids) for side in sides]
    ids = sides[0].ids[: min(n_root, data.max_length)]
    labels = [IGNORED] * len(ids)
    segments = [(len(ids), -1)]
    spans: list[Span] = []
    for side in sides:
        own = side.ids[n_root : data.max_length]
        shift = len(ids) - n_root
        labels += [IGNORED] * len(own)
        for first, end, kind in (span for answer in side.answers for span in answer.spans):
            begin, stop = first + shift, min(end, data.max_length) + shift
            if begin < stop:
                labels[begin:stop] = side.ids[first : first + stop - begin]
                spans.append((begin, stop, kind))
        ids = ids + own
        segments.append((len(own), 0))
    answers = [answer for side in sides for answer in side.answers if answer.spans]
    ended = [(side.ids, answer) for side in sides for answer in side.answers if answer.has_stop]
    whole = Example(
        input_ids=ids,
        labels=labels,
        n_answers=len(answers),
        n_stops=sum(answer.end <= data.max_length for _ids, answer in ended),
        n_cut_stops=sum(answer.end > data.max_length for _ids, answer in ended),
        stop_tokens=tuple(sorted({own[answer.end - 1] for own, answer in ended if answer.end <= data.max_length})),
        n_empty=sum(answer.is_empty for answer in answers),
        last_answer_start=min(sides[0].answers[-1].first, len(ids)),
        is_truncated=max(lengths) > data.max_length,
        segments=tuple(segments),
        spans=tuple(sorted(spans)),
        is_pair=True,
        n_chosen=_n_learned(sides[0]),
        n_rejected=_n_learned(sides[1]),
        n_cut_sides=sum(length > data.max_length for length in lengths),
    )
    ends = [segments[0][0], len(ids) - segments[2][0], len(ids)]
    is_left = all(any(label != IGNORED for label in labels[a:b]) for a, b in pairwise(ends))
    is_dropped = whole.is_truncated and data.overlong == "drop"
    return whole if is_left and not is_dropped else _unlearned(whole, sides[0], is_dropped, data.max_length)


def _n_learned(side: Context) -> int:
    return sum(end - first for answer in side.answers for first, end, _kind in answer.spans)


def _unlearned(whole: Example, side: Context, is_dropped: bool, max_length: int) -> Example:
    """A pair of which an answer is lost, or that is dropped: its first context, without anything to learn."""
    ids = side.ids[:max_length]
    return replace(
        whole,
        input_ids=ids,
        labels=[IGNORED] * len(ids),
        n_answers=0 if is_dropped else whole.n_answers,
        n_stops=0,
        n_cut_stops=0 if is_dropped else whole.n_answers,
        stop_tokens=(),
        n_empty=0,
        last_answer_start=len(ids),
        segments=(),
        spans=(),
    )
