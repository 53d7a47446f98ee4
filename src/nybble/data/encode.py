"""From rows to token ids and labels: what is learned, marked token by token.

The text is tokenized whole and answers are found by character offsets, so that training sees the very tokens that
generation will meet at the border of prompt and answer. Each learned answer ends with the token that ends a turn; that
token is learned too. Padding is never a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.data.shapes import Form, Piece, Turn, alpaca_prompt
from nybble.errors import RowsError

IGNORED = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True)
class Example:
    """One row in tokens."""

    input_ids: list[int]
    labels: list[int]  # token id where learned, else -100; not shifted
    n_answers: int  # stretches of learned tokens
    n_stops: int  # of those, how many end with a learned end-of-turn token
    last_answer_start: int  # index of the last answer's first token
    is_truncated: bool
    answer: str | None = None  # what the row says is right, where it says so

    @property
    def n_trained(self) -> int:
        """Labels that count in the loss: the first position is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the last answer."""
        return self.input_ids[: self.last_answer_start]


@dataclass
class _Spans:
    """Tokens under construction, and the spans `(first, end, has_stop)` that are answers."""

    ids: list[int]
    answers: list[tuple[int, int, bool]]


def encode_row(form: Form, tokenizer: Any, max_length: int, loss_on: str, where: str) -> Example:
    """Token ids and labels of one row, cut to `max_length`.

    Raises:
        RowsError: the chat template cannot render the row, or cannot be split into turns.
    """
    if form and isinstance(form[0], Turn):
        spans = _encode_turns([t for t in form if isinstance(t, Turn)], tokenizer, loss_on, where)
    else:
        spans = _encode_pieces([p for p in form if isinstance(p, Piece)], tokenizer)
    ids = spans.ids[:max_length]
    learned = [(first, min(end, max_length), stop and end <= max_length) for first, end, stop in spans.answers]
    learned = [span for span in learned if span[0] < span[1]]
    labels = [IGNORED] * len(ids)
    for first, end, _stop in learned if loss_on == "answers" else [(0, len(ids), True)]:
        labels[first:end] = ids[first:end]
    return Example(
        input_ids=ids,
        labels=labels,
        n_answers=len(spans.answers),
        n_stops=sum(stop for _first, _end, stop in learned),
        last_answer_start=learned[-1][0] if learned else len(ids),
        is_truncated=len(spans.ids) > max_length,
    )


def _encode_pieces(pieces: list[Piece], tokenizer: Any) -> _Spans:
    spans = _Spans([], [])
    for piece in pieces:
        if tokenizer.bos_token_id is not None and _adds_bos(tokenizer):
            spans.ids.append(tokenizer.bos_token_id)
        ids, ends = _tokenize(piece.text, tokenizer)
        offset = len(spans.ids)
        first = offset + next((i for i, end in enumerate(ends) if end > piece.answer_start), len(ids))
        spans.ids += [*ids, tokenizer.eos_token_id]
        spans.answers.append((first, len(spans.ids), True))
    return spans


def _encode_turns(turns: list[Turn], tokenizer: Any, loss_on: str, where: str) -> _Spans:
    text = _render(turns, tokenizer, where)
    borders = [_answer_border(turns, k, text, tokenizer, where) for k, t in enumerate(turns) if t.role == "assistant"]
    if any(border is None for border in borders) and loss_on == "answers":
        raise RowsError(
            f"{where}: the chat template renders earlier turns differently once later ones follow, so answers cannot "
            "be found; set --chat_template to another one, or --loss_on all"
        )
    ids, ends = _tokenize(text, tokenizer)
    if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    special -= {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    spans = _Spans(ids, [])
    # Where answers cannot be told apart, all is one of them.
    known = [border for border in borders if border is not None] if None not in borders else [(-1, len(text))]
    for border in known:
        inside = [i for i, end in enumerate(ends) if border[0] < end <= border[1]]
        stops = [i for i in inside if ids[i] in special]
        # The turn ends with its last special token; line breaks that a template puts behind it are not learned.
        if inside:
            spans.answers.append((inside[0], (stops[-1] if stops else inside[-1]) + 1, bool(stops)))
    if spans.answers and not spans.answers[-1][2]:
        first, end, _stop = spans.answers[-1]
        spans.ids = [*ids[:end], tokenizer.eos_token_id]  # a template without an end token: we add it
        spans.answers[-1] = (first, end + 1, True)
    return spans


def _answer_border(turns: list[Turn], k: int, text: str, tokenizer: Any, where: str) -> tuple[int, int] | None:
    """Characters of `text` that are turn `k`, or None where the template does not keep earlier turns as they were."""
    whole = _render(turns[: k + 1], tokenizer, where)
    if k == 0:  # no template renders nothing: the header ends where two different contents begin to differ
        a, b = (_render([Turn(turns[0].role, content)], tokenizer, where) for content in ("a", "b"))
        differs = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        return (next(differs, 0), len(whole)) if text.startswith(whole) else None
    for generation_prompt in (True, False):
        before = _render(turns[:k], tokenizer, where, generation_prompt)
        if whole.startswith(before) and text.startswith(whole):
            return len(before), len(whole)
    return None


def _render(turns: list[Turn], tokenizer: Any, where: str, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    # A template is a program of somebody else's; these are the ways in which one fails.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RowsError(f"{where}: the chat template refuses it: {error}") from error


def encode_prompt(question: str, tokenizer: Any, form: str) -> list[int]:
    """Token ids of a user's question, ready for the answer, put as the training rows were (`shapes.prompt_form`)."""
    if form == "template":
        text = _render([Turn("user", question)], tokenizer, "prompt", add_generation_prompt=True)
    else:
        text = {"inst": f"[INST] {question} [/INST]", "alpaca": alpaca_prompt(question)}.get(form, question)
    ids, _ends = _tokenize(text, tokenizer)
    if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids, and for each token the character behind its last.

    A token that begins in the prompt and ends in the answer belongs to the answer: generation has to produce it.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [end for _start, end in encoded["offset_mapping"]]


def _adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its begin token first when asked for nothing special."""
    return bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)
