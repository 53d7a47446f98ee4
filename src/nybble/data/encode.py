"""Turn rows into token ids and labels; the labels say which tokens are learned.

Each answer is learned behind the tokens that generation will see before it, with the token that ends its turn. A row is
one example, unless `max_length` or the chat template part it: the contexts of a conversation whose earlier turns the
template rewrites form a tree (`nybble.data.tree`). Padding is never a label.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.contexts import Answer, Context, encode_turns, n_tokens
from nybble.data.coverage import NOTHING_LOST, Lost
from nybble.data.kinds import Span
from nybble.data.rendered import CHAT_FORMATS, without_stop
from nybble.data.shapes import Form, Piece, Turn, answers_of, as_first_unit, exchanges, prompt_form_of
from nybble.data.tokens import IGNORED, adds_bos, special_tokens, tokenize
from nybble.data.tree import Segments, merge_contexts, n_shared, path_before, places_in_tree


@dataclass(frozen=True)
class Example:
    """One training example: a tokenized row, a part of one, or a tree of contexts (see `nybble.data.tree`)."""

    input_ids: list[int]
    labels: list[int]  # token id where learned, else -100; not shifted
    n_answers: int  # answers to learn, including those that max_length cuts away
    n_stops: int  # how many of those answers end with a learned end-of-turn token
    n_cut_stops: int  # how many of those answers lose their end-of-turn token to max_length
    stop_tokens: tuple[int, ...]  # distinct ids that end the learned answers
    n_empty: int  # answers that hold only white space
    last_answer_start: int  # index of the last answer's first token
    is_truncated: bool
    row: int = 0  # row number, from 1
    answer: str | None = None  # the reference answer, if the row has one
    segments: Segments = ()  # of a tree
    spans: tuple[Span, ...] = ()  # the learned tokens by kind
    is_pair: bool = False  # a tree of a prompt and two answers (see `nybble.data.pairs`)
    is_desirable: bool | None = None  # whether the first answer is good, under kto
    n_chosen: int = 0  # tokens to learn of the first answer of a pair, before truncation
    n_rejected: int = 0  # and of the second
    n_cut_sides: int = 0  # how many of the two are truncated

    @property
    def n_trained(self) -> int:
        """The number of labels that count in the loss; the first position is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the last answer."""
        return path_before(self.input_ids, self.segments, self.last_answer_start)


@dataclass(frozen=True)
class EncodedRow:
    """The examples of one row, with counts of the whole row."""

    examples: list[Example]  # several if the row was split, or if its contexts do not fit into one
    length: int  # tokens of the longest context before truncation
    n_turns: int  # answers in the row, learned or not
    key: int  # equal for rows with equal tokens
    prompt_form: str  # "template", the chat format of the text, "inst", "alpaca", or "" for plain text
    not_used: tuple[str, ...] = ()  # columns and message keys that hold something and are not used
    notes: tuple[str, ...] = ()  # what was changed in the row
    fault: str = ""  # why the row is skipped, if it is
    lost: Lost = NOTHING_LOST  # characters that the tokenizer has no token for


def encode_row(
    form: Form,
    tokenizer: Any,
    max_length: int,
    loss_on: str = "answers",
    overlong: str = "truncate",
    reasoning: str = "learn",
    where: str = "",
) -> EncodedRow:
    """Tokenize and label one row; no example is longer than `max_length` tokens.

    Args:
        form: the row as pieces or turns.
        tokenizer: a fast tokenizer of transformers.
        max_length: limit in tokens for each example.
        loss_on: as the setting of this name.
        overlong: what happens to a row above `max_length`: "truncate", "drop" or "split".
        reasoning: as the setting of this name.
        where: the row's place, which starts each error message.

    Raises:
        RowsError: the chat template cannot render the row, leaves out something that it says, or its answers cannot be
            located.
    """
    whole, notes = contexts_of(form, tokenizer, loss_on, reasoning, where)
    parts = [whole]
    length = max(len(context.ids) for context in whole)
    key = key_of([token for context in whole for token in context.ids])
    if length > max_length and overlong == "drop":
        parts = [[Context(whole[0].ids, [])]]  # without answers, so nothing is learned
        loss_on = "answers"
    elif length > max_length and overlong == "split":
        forms = _split(form, tokenizer, max_length)
        parts = [contexts_of(part, tokenizer, loss_on, reasoning, where)[0] for part in forms]
    examples = [example for contexts in parts for example in _examples(contexts, max_length, loss_on)]
    return EncodedRow(
        _learned(examples),
        length,
        n_turns=len(answers_of(form)),
        key=key,
        prompt_form=prompt_form_of(form),
        notes=notes,
    )


def _learned(examples: list[Example]) -> list[Example]:
    """The examples with something to learn, at least one; the answers of the others are counted in the first."""
    learned = [example for example in examples if example.n_trained]
    if len(learned) == len(examples) or not learned:
        return learned or examples[:1]
    others = [example for example in examples if not example.n_trained]
    first = replace(
        learned[0],
        n_answers=learned[0].n_answers + sum(example.n_answers for example in others),
        n_cut_stops=learned[0].n_cut_stops + sum(example.n_cut_stops for example in others),
        is_truncated=learned[0].is_truncated or any(example.is_truncated for example in others),
    )
    return [first, *learned[1:]]


def key_of(ids: Sequence[int]) -> int:
    """A 64-bit hash of the ids; the probability that any two of a million different rows collide is 3e-8."""
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest())


def contexts_of(
    form: Form, tokenizer: Any, loss_on: str, reasoning: str, where: str
) -> tuple[list[Context], tuple[str, ...]]:
    """The contexts of a row, one or one for each learned answer, and notes of what was changed in it."""
    if form and isinstance(form[0], Turn):
        return encode_turns([t for t in form if isinstance(t, Turn)], tokenizer, loss_on, reasoning, where)
    context = _encode_pieces([p for p in form if isinstance(p, Piece)], tokenizer)
    return [Context(context.ids, context.answers[-1:]) if loss_on == "last_answer" else context], ()


def _examples(contexts: Sequence[Context], max_length: int, loss_on: str) -> Iterator[Example]:
    """The contexts in as few examples as a greedy search finds: each joins the tree before it if that still fits."""
    if len(contexts) == 1:
        yield _example(contexts, max_length, loss_on)
        return
    group: list[Context] = []
    size = 0
    for context in contexts:
        ids = context.ids[:max_length]
        n_new = len(ids) - max((n_shared(ids, other.ids[:max_length]) for other in group), default=0)
        if group and size + n_new > max_length:
            yield _example(group, max_length, loss_on)
            group = []
            n_new = len(ids)
            size = 0
        group.append(context)
        size += n_new
    yield _example(group, max_length, loss_on)


def _example(contexts: Sequence[Context], max_length: int, loss_on: str) -> Example:
    """Merge contexts, each cut at `max_length`, into one example."""
    cut: list[tuple[list[int], list[int]]] = []
    for context in contexts:
        ids = context.ids[:max_length]
        labels = [IGNORED] * len(ids) if loss_on != "all" else list(ids)
        for first, end, _kind in (span for answer in context.answers for span in answer.spans):
            labels[first:end] = ids[first:end]
        cut.append((ids, labels))
    ids, labels, segments = merge_contexts(cut) if len(cut) > 1 else (*cut[0], ())
    spans: list[Span] = []
    starts: list[int] = []
    for context, (own, _labels) in zip(contexts, cut, strict=True):
        places = places_in_tree(ids, segments, own) if segments else range(len(own))
        for answer in context.answers:
            spans += [run for span in answer.spans for run in _placed(places, span)]
            starts += places[answer.first : answer.first + 1]
    answers = [answer for context in contexts for answer in context.answers if answer.spans]
    ended = [(context.ids, answer) for context in contexts for answer in context.answers if answer.has_stop]
    return Example(
        input_ids=ids,
        labels=labels,
        n_answers=len(answers),
        n_stops=sum(answer.end <= max_length for _ids, answer in ended),
        n_cut_stops=sum(answer.end > max_length for _ids, answer in ended),
        stop_tokens=tuple(sorted({own[answer.end - 1] for own, answer in ended if answer.end <= max_length})),
        n_empty=sum(answer.is_empty for answer in answers),
        last_answer_start=starts[-1] if starts else len(ids),
        is_truncated=any(len(context.ids) > max_length for context in contexts),
        segments=segments,
        spans=tuple(sorted(spans) if loss_on != "all" else _filled(spans, len(ids))),
    )


def _placed(places: Sequence[int], span: Span) -> Iterator[Span]:
    """A span of a context as spans of the sequence that holds its tokens at `places`."""
    first, end, kind = span
    inside = places[first:end]
    if isinstance(inside, range):
        if inside:
            yield inside[0], inside[-1] + 1, kind
        return
    begin = 0
    for i in range(1, len(inside) + 1):
        if i == len(inside) or inside[i] != inside[i - 1] + 1:
            yield inside[begin], inside[i - 1] + 1, kind
            begin = i


def _filled(spans: Sequence[Span], n_tokens: int) -> Iterator[Span]:
    """Spans of one sequence, in order, and between them spans of other text."""
    at = 0
    for span in [*sorted(spans), (n_tokens, n_tokens, "")]:
        if at < span[0]:
            yield at, span[0], "text"
        if span[2]:
            yield span
        at = span[1]


def _split(form: Form, tokenizer: Any, max_length: int) -> list[Form]:
    """Split a row between exchanges into parts that fit where possible; each part begins with the row's system text."""
    head, units = exchanges(form)
    parts: list[Form] = []
    part = [*head, *units[0]]
    for unit in units[1:]:
        if _n_tokens([*part, *unit], tokenizer) > max_length:
            parts.append(part)
            part = [*head, *as_first_unit(unit, form)]
        else:
            part += unit
    return [*parts, part]


def _n_tokens(form: Form, tokenizer: Any) -> int:
    turns = [part for part in form if isinstance(part, Turn)]
    pieces = [part for part in form if isinstance(part, Piece)]
    return n_tokens(turns, tokenizer) if turns else len(_encode_pieces(pieces, tokenizer).ids)


def _encode_pieces(pieces: list[Piece], tokenizer: Any) -> Context:
    whole: list[int] = []
    answers: list[Answer] = []
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    special = special_tokens(tokenizer)
    for piece in pieces:
        ids, ends = tokenize(piece.text, tokenizer, special.spelled(piece.text) if piece.is_literal else ())
        is_rendered = piece.prompt_form in CHAT_FORMATS
        # Rendered text has one begin token; [INST] text has one before each question.
        if not (is_rendered and whole) and ids[:1] != begin:
            whole += begin
        offset = len(whole)
        # A token that spans the end of the prompt and the start of the answer counts as answer: generation produces it.
        first = offset + next((i for i, end in enumerate(ends) if end > piece.answer_start), len(ids))
        has_stop = ids[-1:] == [tokenizer.eos_token_id] or (is_rendered and ids[-1] in special.stops)
        whole += ids if has_stop else [*ids, tokenizer.eos_token_id]
        end = len(whole)
        words = without_stop(piece.text[piece.answer_start :], piece.prompt_form)
        kind = "answer" if piece.answer_start else "text"
        spans = [span for span in [(first, end - 1, kind), (end - 1, end, "end")] if span[0] < span[1]]
        answers.append(Answer(first, end, True, not words.strip(), spans))
    return Context(whole, answers)
