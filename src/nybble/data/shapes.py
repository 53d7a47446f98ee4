"""The two forms of a row, pieces and turns, and what can be asked of them whatever their shape was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nybble.data.rendered import ChatFormat, find_answers, find_spans, with_system, without_stop
from nybble.errors import RowsError


@dataclass(frozen=True)
class Piece:
    """A prompt and its answer between a begin and an end token; characters from `answer_start` on are learned."""

    text: str
    answer_start: int
    is_literal: bool = False  # treat text that looks like a control token as plain text
    prompt_form: str = ""  # "" for plain text, "inst", "alpaca", or one of `rendered.CHAT_FORMATS`


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str  # "system", "user", "assistant", "tool", or "tools" (the functions that may be called, as a JSON list)
    content: str
    calls: str = ""  # the calls that an assistant makes, as a JSON list
    calls_as_text: str = ""  # the calls as a row writes them in a content; for templates that take no calls
    reasoning: str = ""  # what an assistant thinks before it answers
    name: str = ""  # of the speaker, or of the function whose result a tool turn is
    tool_call_id: str = ""  # the id of the call whose result a tool turn is
    learn: bool = True  # whether the loss may count this turn; only an assistant's turns are learned


Form = Sequence[Piece | Turn]

_MOST_CHARACTERS = 2_000_000  # longer than any context; tokenizing more takes gigabytes and minutes
_RESPONSE = "### Response:\n"
_SPACE = re.compile(r"\s*")
_ALPACA_FORMAT = ChatFormat("### Response:", "</s>", "### Instruction: {}", needs_stop=False)
_ALPACA = f"### Instruction:\n{{instruction}}\n\n{_RESPONSE}"
_ALPACA_WITH_INPUT = f"### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{_RESPONSE}"


def split_text(text: str) -> list[Piece]:
    """Split text with the marks of a known form into pieces; text without marks is one piece and learned as a whole.

    The literals `<s>` and `</s>` stand for the tokenizer's own begin and end tokens, whatever their names are.
    """
    form, answers = find_answers(text)
    if answers:
        begins = [0, *(end for _start, end in answers)]
        return [
            Piece(text[begin:end], start - begin, prompt_form=form)
            for begin, (start, end) in zip(begins, answers, strict=False)
        ]
    pieces = _split_alpaca(text)
    if pieces:
        return pieces
    for part in re.split(r"</s>", text.strip()):
        content = part.strip().removeprefix("<s>").lstrip() if "[INST]" in part else part.removeprefix("<s>")
        if not content.strip():
            continue
        if content.startswith("[INST]") and "[/INST]" not in content:
            continue  # a question without an answer
        prompt, mark, _answer = content.rpartition("[/INST]")
        # White space before the end token stays, because a chat template writes it too.
        tail = part[len(part.rstrip()) :] if mark else ""
        start = len(prompt) + len(mark) if mark else 0
        pieces.append(Piece(content.rstrip() + tail, start, prompt_form="inst" if mark else ""))
    return pieces


def _split_alpaca(text: str) -> list[Piece]:
    """The exchanges of text with `### Instruction:` and `### Response:`; none if responses follow each other."""
    answers = find_spans(text, _ALPACA_FORMAT)
    pieces = []
    begin = 0
    for first, end in answers:
        start = first + 1 if text.startswith("\n", first) else first
        if _ALPACA_FORMAT.header in text[start:end]:
            return []
        prompt = text[begin:start].removeprefix("<s>")
        pieces.append(Piece(prompt + text[start:end].removesuffix("</s>"), len(prompt), prompt_form="alpaca"))
        space = _SPACE.match(text, end)
        begin = space.end() if space else end
    return pieces


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """An instruction in Alpaca's plain form, up to where the answer begins."""
    return (_ALPACA_WITH_INPUT if extra else _ALPACA).format(instruction=instruction, input=extra)


def prompt_form_of(form: Form) -> str:
    """The prompt form of a row: "template", a piece's form, or "" for plain text. `nybble ask` must use the same."""
    names = (part.prompt_form if isinstance(part, Piece) else "template" for part in form)
    return next((name for name in names if name), "")


def answers_of(form: Form) -> list[str]:
    """The text of each answer, in order."""
    turns = [part.content for part in form if isinstance(part, Turn) and part.role == "assistant"]
    pieces = [part for part in form if isinstance(part, Piece)]
    return turns + [without_stop(piece.text[piece.answer_start :], piece.prompt_form) for piece in pieces]


def exchanges(form: Form) -> tuple[Form, list[Form]]:
    """The units that a row can be split into: its tools and system text, and each question with its answers."""
    head = [part for part in form[:2] if isinstance(part, Turn) and part.role in ("tools", "system")]
    units: list[list[Piece | Turn]] = []
    former = ""
    for part in form[len(head) :]:
        role = part.role if isinstance(part, Turn) else ""
        if not units or isinstance(part, Piece) or (role == "user" and former == "assistant"):
            units.append([])
        units[-1].append(part)
        former = role
    return head, list(units)


def as_first_unit(unit: Form, form: Form) -> Form:
    """A unit of `exchanges(form)` as the first of a row: rendered text has its system text only in its first piece."""
    first = form[0]
    piece = unit[0]
    if not (isinstance(first, Piece) and isinstance(piece, Piece) and first.prompt_form == piece.prompt_form):
        return unit
    prompt = piece.text[: piece.answer_start]
    answer = piece.text[piece.answer_start :]
    prompt = with_system(prompt, first.text[: first.answer_start], piece.prompt_form)
    return [replace(piece, text=prompt + answer, answer_start=len(prompt)), *unit[1:]]


def check_size(n_characters: int, where: str) -> None:
    """Check that a row's text is not longer than any context.

    Raises:
        RowsError: it is.
    """
    if n_characters > _MOST_CHARACTERS:
        raise RowsError(
            f"{where}: the text has {n_characters:,} characters; at most {_MOST_CHARACTERS:,} are allowed; split it "
            "into several rows"
        )
