"""Turn rows into token ids and labels; the labels say which tokens are learned.

The text is tokenized as a whole and answers are located by character offsets, so that training sees exactly the tokens
that generation will see at the border of prompt and answer. Each learned answer ends with an end-of-turn token, which
is learned too. Padding is never a label.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from nybble.data.adapt import adapt_to_template
from nybble.data.rendered import CHAT_FORMATS
from nybble.data.shapes import Form, Piece, Turn, alpaca_prompt, answers_of, as_first_unit, exchanges, prompt_form_of
from nybble.data.templates import render_chat
from nybble.data.tokens import IGNORED, MARKS, adds_bos, mark, spelled, stop_ids, tokenize, unmark
from nybble.data.tree import Segments, path_before
from nybble.errors import RowsError

_MOST_SEARCHED = 1000  # answers of one row; locating each renders all turns before it, and 1,000 take about 20 s


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

    examples: list[Example]  # several if the row was split
    length: int  # tokens before truncation
    n_turns: int  # answers in the row, learned or not
    key: int  # equal for rows with equal tokens
    prompt_form: str  # "template", the chat format of the text, "inst", "alpaca", or "" for plain text
    not_used: tuple[str, ...] = ()  # columns and message keys that hold something and are not used
    notes: tuple[str, ...] = ()  # what was changed in the row
    fault: str = ""  # why the row is skipped, if it is


@dataclass
class _Spans:
    """The tokens of a row, and the answers in it as spans `(first, end, has_stop)` of token indices."""

    ids: list[int]
    answers: list[tuple[int, int, bool]]


def encode_row(
    form: Form, tokenizer: Any, max_length: int, loss_on: str = "answers", overlong: str = "truncate", where: str = ""
) -> EncodedRow:
    """Tokenize and label one row; no example is longer than `max_length` tokens.

    Args:
        form: the row as pieces or turns.
        tokenizer: a fast tokenizer of transformers.
        max_length: limit in tokens for each example.
        loss_on: "answers", "last_answer", or "all" tokens.
        overlong: what happens to a row above `max_length`: "truncate", "drop" or "split".
        where: the row's place, which starts each error message.

    Raises:
        RowsError: the chat template cannot render the row, or its answers cannot be located in the rendered text.
    """
    whole = _encode(form, tokenizer, loss_on, where)
    parts: list[tuple[Form, _Spans]] = [(form, whole)]
    if len(whole.ids) > max_length and overlong == "drop":
        parts = [((), _Spans(whole.ids, []))]  # without answers, so nothing is learned
        loss_on = "answers"
    elif len(whole.ids) > max_length and overlong == "split":
        parts = [(part, _encode(part, tokenizer, loss_on, where)) for part in _split(form, tokenizer, max_length)]
    examples = [_cut(spans, _n_empty(part, loss_on), max_length, loss_on) for part, spans in parts]
    if len(examples) > 1:
        examples = [example for example in examples if example.n_trained] or examples[:1]
    return EncodedRow(
        examples=examples,
        length=len(whole.ids),
        n_turns=len(answers_of(form)),
        key=key_of(whole.ids),
        prompt_form=prompt_form_of(form),
    )


def key_of(ids: Sequence[int]) -> int:
    """A 64-bit hash of the ids; the probability that any two of a million different rows collide is 3e-8."""
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest())


def _encode(form: Form, tokenizer: Any, loss_on: str, where: str) -> _Spans:
    if form and isinstance(form[0], Turn):
        return _encode_turns([t for t in form if isinstance(t, Turn)], tokenizer, loss_on, where)
    return _encode_pieces([p for p in form if isinstance(p, Piece)], tokenizer)


def _cut(spans: _Spans, n_empty: int, max_length: int, loss_on: str) -> Example:
    ids = spans.ids[:max_length]
    answers = spans.answers[-1:] if loss_on == "last_answer" else spans.answers
    learned = [(first, min(end, max_length), stop and end <= max_length) for first, end, stop in answers]
    learned = [span for span in learned if span[0] < span[1]]
    labels = [IGNORED] * len(ids)
    for first, end, _stop in [(0, len(ids), True)] if loss_on == "all" else learned:
        labels[first:end] = ids[first:end]
    return Example(
        input_ids=ids,
        labels=labels,
        n_answers=len(answers),
        n_stops=sum(stop for _first, _end, stop in learned),
        n_cut_stops=sum(stop and end > max_length for _first, end, stop in answers),
        stop_tokens=tuple(sorted({ids[end - 1] for _first, end, stop in learned if stop})),
        n_empty=n_empty,
        last_answer_start=learned[-1][0] if learned else len(ids),
        is_truncated=len(spans.ids) > max_length,
    )


def _n_empty(form: Form, loss_on: str) -> int:
    blank = [not text.strip() for text in answers_of(form)]
    return sum(blank[-1:] if loss_on == "last_answer" else blank)


def _split(form: Form, tokenizer: Any, max_length: int) -> list[Form]:
    """Split a row between exchanges into parts that fit where possible; each part begins with the row's system text."""
    head, units = exchanges(form)
    parts: list[Form] = []
    part = [*head, *units[0]]
    for unit in units[1:]:
        if len(_encode([*part, *unit], tokenizer, "all", "").ids) > max_length:
            parts.append(part)
            part = [*head, *as_first_unit(unit, form)]
        else:
            part += unit
    return [*parts, part]


def _encode_pieces(pieces: list[Piece], tokenizer: Any) -> _Spans:
    spans = _Spans([], [])
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    stopping = stop_ids(tokenizer)
    for piece in pieces:
        ids, ends = tokenize(piece.text, tokenizer, spelled(piece.text, tokenizer) if piece.is_literal else ())
        is_rendered = piece.prompt_form in CHAT_FORMATS
        # Rendered text has one begin token; [INST] text has one before each question.
        if not (is_rendered and spans.ids) and ids[:1] != begin:
            spans.ids += begin
        offset = len(spans.ids)
        # A token that spans the end of the prompt and the start of the answer counts as answer: generation produces it.
        first = offset + next((i for i, end in enumerate(ends) if end > piece.answer_start), len(ids))
        has_stop = ids[-1:] == [tokenizer.eos_token_id] or (is_rendered and ids[-1] in stopping)
        spans.ids += ids if has_stop else [*ids, tokenizer.eos_token_id]
        spans.answers.append((first, len(spans.ids), True))
    return spans


def _encode_turns(turns: list[Turn], tokenizer: Any, loss_on: str, where: str) -> _Spans:
    turns = adapt_to_template(turns, tokenizer, where)
    contents, sign = mark([turn.content for turn in turns], tokenizer)
    turns = [replace(turn, content=content) for turn, content in zip(turns, contents, strict=True)]
    marked = _render(turns, tokenizer, where)
    text, as_text = unmark(marked, sign)
    borders = _answer_borders(turns, marked, tokenizer, loss_on, where)
    if sign:
        borders = [(a - marked.count(sign, 0, a), b - marked.count(sign, 0, b)) for a, b in borders]
    ids, ends = tokenize(text, tokenizer, as_text)
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
        ends = [0, *ends]
    stopping = stop_ids(tokenizer)
    spans = _Spans(ids, [])
    for border in borders:
        inside = range(bisect_right(ends, border[0]), bisect_right(ends, border[1]))
        stops = [i for i in inside if ids[i] in stopping]
        # The turn ends with its last special token; line breaks that a template adds after it are not learned.
        if inside:
            spans.answers.append((inside[0], (stops[-1] if stops else inside[-1]) + 1, bool(stops)))
    if spans.answers and turns[-1].learn and not spans.answers[-1][2]:
        first, end, _stop = spans.answers[-1]
        spans.ids = [*ids[:end], tokenizer.eos_token_id]  # the template writes no end token, so add one
        spans.answers[-1] = (first, end + 1, True)
    return spans


def _answer_borders(turns: list[Turn], text: str, tokenizer: Any, loss_on: str, where: str) -> list[tuple[int, int]]:
    """The answers in `text` as spans of characters.

    If the answers cannot be located and `loss_on` is "all", the whole text is one answer.
    """
    answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
    if loss_on == "last_answer":
        answers = answers[-1:]
    answers = [k for k in answers if turns[k].learn]
    borders = list(_search(turns, answers, text, tokenizer, where))
    if None not in borders:
        return [border for border in borders if border is not None]
    if loss_on == "all":
        return [(-1, len(text))]
    raise RowsError(
        f"{where}: the chat template renders earlier turns differently when later turns follow, so answers cannot "
        "be located; set --chat_template to another one, or --loss_on to last_answer or all"
    )


def _search(
    turns: list[Turn], answers: list[int], text: str, tokenizer: Any, where: str
) -> Iterator[tuple[int, int] | None]:
    """Yield the span of each answer, or None if it cannot be located.

    Answers between the same two gaps have the same borders relative to them, so only the first of each kind is
    searched.
    """
    # The first and the last answer have gaps of their own, so for three answers or fewer nothing would be saved.
    gaps = _gaps(turns, text, tokenizer, where) if len(answers) > 3 else {}
    # Gaps -> how many characters of them belong to the answer between them.
    known: dict[tuple[str, str] | None, tuple[int, int]] = {}
    n_searched = 0
    for k in answers:
        start, end, gap = gaps.get(k, (0, 0, None)) if not turns[k].calls else (0, 0, None)
        border: tuple[int, int] | None
        if gap in known:
            n_before, n_after = known[gap]
            border = start - n_before, end + n_after
        else:
            n_searched += 1
            if n_searched > _MOST_SEARCHED:
                raise RowsError(
                    f"{where}: the chat template renders each of its {len(turns):,} turns in a different way, and at "
                    f"most {_MOST_SEARCHED:,} such answers are allowed; split it into several rows"
                )
            border = _answer_border(turns, k, text, tokenizer, where) or _find_border(turns, k, text, tokenizer, where)
            if border and gap and border[0] <= start <= end <= border[1]:
                known[gap] = start - border[0], border[1] - end
        yield border


def _gaps(turns: list[Turn], text: str, tokenizer: Any, where: str) -> dict[int, tuple[int, int, tuple[str, str]]]:
    """For each turn: where its content, without surrounding white space, is in `text`, and the text on both sides of
    it up to the content of the neighbouring turns. Empty if the template changes the contents."""
    sign = _unused(text)
    spoken = [k for k, turn in enumerate(turns) if turn.role != "tools"]
    marked = list(turns)
    for k in spoken:
        words = turns[k].content.strip()
        marked[k] = replace(turns[k], content=turns[k].content.replace(words, sign + words + sign, 1))
    try:
        parts = _render(marked, tokenizer, where).split(sign)
    except RowsError:  # a template may parse a turn's content and fail because of the marks
        return {}
    if len(parts) != 2 * len(spoken) + 1 or "".join(parts) != text:
        return {}
    ends = list(accumulate(map(len, parts)))
    return {k: (ends[2 * i], ends[2 * i + 1], (parts[2 * i], parts[2 * i + 2])) for i, k in enumerate(spoken)}


def _unused(text: str) -> str:
    return next(chr(code) for code in MARKS if chr(code) not in text)


def _answer_border(turns: list[Turn], k: int, text: str, tokenizer: Any, where: str) -> tuple[int, int] | None:
    """The span of turn `k` in `text`, or None if the template changes earlier turns when later ones follow."""
    whole = _render(turns[: k + 1], tokenizer, where) if k + 1 < len(turns) else text
    # Templates cannot render an empty chat, so the header of a first turn is found by rendering two contents: it ends
    # where the results begin to differ.
    if all(turn.role == "tools" for turn in turns[:k]):
        a, b = (_render([Turn("assistant", content)], tokenizer, where) for content in ("a", "b"))
        differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        return (next(differs, 0), len(whole)) if text.startswith(whole) else None
    for generation_prompt in (True, False):
        before = _render(turns[:k], tokenizer, where, generation_prompt)
        if whole.startswith(before) and text.startswith(whole):
            return len(before), len(whole)
    return None


def _find_border(turns: list[Turn], k: int, text: str, tokenizer: Any, where: str) -> tuple[int, int] | None:
    """The span of turn `k` in `text`, located by a mark at its end; for templates that rewrite earlier turns.

    The turn begins after the header that asks for an answer, as in generation, and ends as it would as the last turn.
    """
    sign = _unused(text)

    def with_mark(upto: int) -> str:
        content = turns[k].content.rstrip()  # the mark goes before white space, which a template may strip
        marked = replace(turns[k], content=content + sign + turns[k].content[len(content) :])
        return _render([*turns[:k], marked, *turns[k + 1 : upto]], tokenizer, where)

    alone = with_mark(k + 1)
    whole = with_mark(len(turns))
    asked, before = (_render(turns[:k], tokenizer, where, asks) for asks in (True, False))
    header = asked[len(before) :]
    tail = alone.partition(sign)[2]
    end = whole.find(sign)
    if end < 0 or whole.replace(sign, "") != text or not asked.startswith(before) or not header.strip():
        return None
    start = text.rfind(header, 0, end)
    while start > 0 and ord(text[start - 1]) in MARKS:  # this header is spelled out in a turn's content
        start = text.rfind(header, 0, start)
    return (start + len(header), end + len(tail)) if start >= 0 and text.startswith(tail, end) else None


def _render(turns: list[Turn], tokenizer: Any, where: str, asks: bool = False) -> str:
    tools = json.loads(turns[0].content) if turns and turns[0].role == "tools" else None
    messages = [_message(turn) for turn in turns if turn.role != "tools"]
    return render_chat(tokenizer, messages, where, tools, asks)


def _message(turn: Turn) -> dict[str, Any]:
    """The turn as chat templates expect it; a key is only there if the turn has something to say under it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = json.loads(turn.calls)
    words = {"reasoning_content": turn.reasoning, "name": turn.name, "tool_call_id": turn.tool_call_id}
    return message | {key: text for key, text in words.items() if text}


def encode_prompt(question: str, tokenizer: Any, form: str, system: str = "") -> list[int]:
    """Token ids of a user's question up to where the answer begins, in the prompt form of the training rows.

    In a form that has no place for a system text, `system` precedes the question.
    """
    if form == "template":
        turns = [Turn("system", system)] if system else []
        return encode_chat([*turns, Turn("user", question)], tokenizer)
    if form == "inst" and system:
        question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
    elif system:
        question = f"{system}\n\n{question}"
    # A plain prompt is the whole text, written by someone who knows its form: its control tokens are intended.
    (marked,), sign = mark([question], tokenizer) if form != "plain" else ([question], "")
    return _tokenize_prompt(question_form(form).replace("{}", marked, 1), sign, tokenizer)


def question_form(form: str) -> str:
    """The text around a question in a prompt form other than "template"; {} stands for the question."""
    forms = {name: chat_format.question for name, chat_format in CHAT_FORMATS.items()}
    return {**forms, "inst": "[INST] {} [/INST]", "alpaca": alpaca_prompt("{}")}.get(form, "{}")


def encode_follow_up(question: str, tokenizer: Any, form: str) -> list[int]:
    """Token ids of a later question, which follow an answer and its end token; for any form except "template"."""
    ids = encode_prompt(question, tokenizer, form)
    if form not in CHAT_FORMATS:
        return ids
    # Rendered text has only one begin token, and may have line breaks between its turns.
    chat_format = CHAT_FORMATS[form]
    between = chat_format.question.partition(chat_format.stop)[2].partition("<")[0]
    ids = ids[1:] if adds_bos(tokenizer) else ids
    return [*tokenize(between, tokenizer)[0], *ids] if between else ids


def encode_chat(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """Token ids of a chat that ends with a question, as the tokenizer's chat template renders it."""
    contents, sign = mark([turn.content for turn in turns], tokenizer)
    marked = [replace(turn, content=content) for turn, content in zip(turns, contents, strict=True)]
    return _tokenize_prompt(_render(marked, tokenizer, "prompt", asks=True), sign, tokenizer)


def _tokenize_prompt(text: str, sign: str, tokenizer: Any) -> list[int]:
    text, as_text = unmark(text, sign)
    ids, _ends = tokenize(text, tokenizer, as_text)
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids
