"""From a row, whatever its shape, to one of two forms.

    pieces    text whose answers are already marked: [INST] text, prompt + completion, plain text
    turns     who says what: messages, sharegpt, alpaca; a chat template will render them

Shapes are told apart by their columns; the first row decides, and a row that differs is an error with its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.rendered import find_answers, with_system, without_stop
from nybble.data.rows import Row, Rows, check_text
from nybble.errors import RowsError
from nybble.guard import brief, clipped, shown
from nybble.recipe import DataSection


@dataclass(frozen=True)
class Piece:
    """A stretch of text between a begin and an end token; learned from `answer_start` on."""

    text: str
    answer_start: int
    is_literal: bool = False  # what looks like a control token is text
    family: str = ""  # how its prompt is put: "" for plainly, "inst", "alpaca", or one of `rendered.FAMILIES`


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str  # "system", "user", "assistant", "tool", or "tools": what may be called, as a JSON list
    content: str
    calls: str = ""  # the tools that an assistant calls, as a JSON list


Form = Sequence[Piece | Turn]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
_MESSAGE_ROLES = ("system", "user", "assistant", "tool")
# Whom a turn may follow; "" is the beginning.
_BEFORE = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("", "system", "user", "tool"),
    "tool": ("assistant", "tool"),
}
_MOST_CHARACTERS = 2_000_000  # more than any context holds; beyond it, tokenizing takes gigabytes and minutes
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_RESPONSE = "### Response:\n"
_ALPACA = f"### Instruction:\n{{instruction}}\n\n{_RESPONSE}"
_ALPACA_WITH_INPUT = f"### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n{_RESPONSE}"


def detect_shape(rows: Rows, data: DataSection) -> str:
    """The shape of the rows, by the columns of the first.

    Raises:
        RowsError: no known set of columns.
    """
    if data.data_format != "auto":
        return data.data_format
    columns = rows.first.keys()
    for shape, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return shape
    if data.dataset_text_field in columns:
        return "text"
    raise RowsError(
        f"{rows.source} row 1: has the columns {_columns(rows.first)}; allowed: "
        f"{data.dataset_text_field} (--dataset_text_field), prompt + completion, instruction + output, messages, "
        "or conversations"
    )


def to_form(row: Row, shape: str, data: DataSection, where: str, has_template: bool) -> Form:
    """The row as pieces or turns.

    Raises:
        RowsError: a column is missing or holds another type; the message starts with `where`.
    """
    if shape == "text":
        return _split_text(_text(row, data.dataset_text_field, where))
    if shape == "prompt_completion":
        if isinstance(row.get("prompt"), list):
            return _turns([*row["prompt"], *_list(row, "completion", where)], "role", "content", where)
        prompt = _text(row, "prompt", where)
        return [Piece(prompt + _text(row, "completion", where), len(prompt))]
    if shape == "alpaca":
        return _alpaca(row, where, has_template)
    if shape == "sharegpt":
        return [*_tools(row, where), *_turns(_list(row, "conversations", where), "from", "value", where)]
    return [*_tools(row, where), *_turns(_list(row, "messages", where), "role", "content", where)]


def _split_text(text: str) -> list[Piece]:
    """Pieces of text with a known family's marks, or the whole text, all of it learned, where there are none.

    The literal `<s>` and `</s>` stand for the tokenizer's own begin and end tokens, whatever those are called.
    """
    family, answers = find_answers(text)
    if answers:
        begins = [0, *(end for _start, end in answers)]
        return [
            Piece(text[begin:end], start - begin, family=family)
            for begin, (start, end) in zip(begins, answers, strict=False)
        ]
    prompt, header, answer = text.partition(_RESPONSE)
    if header and _RESPONSE not in answer:
        prompt = prompt.removeprefix("<s>") + header
        return [Piece(prompt + answer.removesuffix("</s>"), len(prompt), family="alpaca")]
    pieces = []
    for part in re.split(r"</s>", text.strip()):
        content = part.strip().removeprefix("<s>").lstrip() if "[INST]" in part else part.removeprefix("<s>")
        if not content.strip():
            continue
        if content.startswith("[INST]") and "[/INST]" not in content:
            continue  # a question that nobody answers
        prompt, mark, _answer = content.rpartition("[/INST]")
        # What stood before the end token stays as written, its space included: that is what a chat template makes.
        tail = part[len(part.rstrip()) :] if mark else ""
        start, family = (len(prompt) + len(mark), "inst") if mark else (0, "")
        pieces.append(Piece(content.rstrip() + tail, start, family=family))
    return pieces


def _alpaca(row: Row, where: str, has_template: bool) -> Form:
    instruction, output = _text(row, "instruction", where), _text(row, "output", where)
    extra = _text(row, "input", where) if row.get("input") else ""
    if has_template:
        return [Turn("user", f"{instruction}\n\n{extra}" if extra else instruction), Turn("assistant", output)]
    prompt = alpaca_prompt(instruction, extra)
    return [Piece(prompt + output, len(prompt), is_literal=True, family="alpaca")]


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """Alpaca's plain form, up to where the answer begins."""
    return (_ALPACA_WITH_INPUT if extra else _ALPACA).format(instruction=instruction, input=extra)


def put_as(form: Form) -> str:
    """How a prompt was put to the model: "template", a piece's family, or "" for plainly. `ask` must put it alike."""
    families = (part.family if isinstance(part, Piece) else "template" for part in form)
    return next((family for family in families if family), "")


def answers_of(form: Form) -> list[str]:
    """The answers' texts, in order."""
    turns = [part.content for part in form if isinstance(part, Turn) and part.role == "assistant"]
    pieces = [part for part in form if isinstance(part, Piece)]
    return turns + [without_stop(piece.text[piece.answer_start :], piece.family) for piece in pieces]


def exchanges(form: Form) -> tuple[Form, list[Form]]:
    """Tools and system text, and the questions with their answers: what a row can be parted into."""
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


def begun_anew(unit: Form, form: Form) -> Form:
    """A unit of `exchanges` as the beginning of a row: text that is rendered holds its system text in the first."""
    first, piece = form[0], unit[0]
    if not (isinstance(first, Piece) and isinstance(piece, Piece) and first.family == piece.family):
        return unit
    prompt, answer = piece.text[: piece.answer_start], piece.text[piece.answer_start :]
    prompt = with_system(prompt, first.text[: first.answer_start], piece.family)
    return [replace(piece, text=prompt + answer, answer_start=len(prompt)), *unit[1:]]


def _tools(row: Row, where: str) -> list[Turn]:
    """What the row says may be called, as a turn of its own; a JSON text or a list."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowsError(f"{where}: column 'tools' is no JSON ({brief(error)}); repair the row") from error
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RowsError(
            f"{where}: column 'tools' is of type {type(tools).__name__}; it is a list of functions: repair the row"
        )
    return [Turn("tools", json.dumps(tools, ensure_ascii=False))]


def _turns(messages: list[Any], role_key: str, content_key: str, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, message in enumerate(messages, start=1):
        turn = _turn(message, role_key, content_key, f"{where} turn {number}")
        former = turns[-1].role if turns else ""
        if former not in _BEFORE[turn.role]:
            after = f"follows {former!r}" if former else "comes first"
            allowed = ", ".join(name or "the beginning" for name in _BEFORE[turn.role])
            raise RowsError(f"{where} turn {number}: {turn.role!r} {after}; it may follow: {allowed}; repair the row")
        turns.append(turn)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowsError(f"{where}: no assistant turn, so nothing to learn; add the answer, or leave the row out")
    _check_size(sum(len(turn.content) for turn in turns), where)
    return turns


def _turn(message: Any, role_key: str, content_key: str, where: str) -> Turn:
    if not isinstance(message, Mapping) or role_key not in message or not {content_key, "tool_calls"} & message.keys():
        raise RowsError(f"{where}: needs {role_key!r} and {content_key!r}, got {shown(message)}; repair the row")
    role, content, calls = message[role_key], message.get(content_key), message.get("tool_calls")
    if role_key == "from" and isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role, role)
    if role not in _MESSAGE_ROLES:
        raise RowsError(f"{where}: unknown role {shown(role)}; allowed: {', '.join(_MESSAGE_ROLES)}")
    if calls and content is None:
        content = ""
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowsError(f"{where}: {content_key} is of type {type(content).__name__}, not text; repair the row")
    check_text(content, where)
    return Turn(role, content, json.dumps(calls, ensure_ascii=False) if calls else "")


def _text_part(part: Any, where: str) -> str:
    """The text of one part of a content: `{"type": "text", "text": ..}`, or the text alone."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RowsError(f"{where}: a content's part is {shown(kind)}; allowed is {{'type': 'text', 'text': '..'}}")
    return text


def _check_size(n_characters: int, where: str) -> None:
    if n_characters > _MOST_CHARACTERS:
        raise RowsError(
            f"{where}: a text of {n_characters:,} characters; allowed are {_MOST_CHARACTERS:,}; part it into rows"
        )


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise RowsError(f"{where}: column {column!r} is missing; this row has {_columns(row)}; repair the row")
    if not isinstance(row[column], str):
        raise RowsError(f"{where}: column {column!r} is of type {type(row[column]).__name__}, not text; repair the row")
    _check_size(len(row[column]), where)
    return str(row[column])


def _columns(row: Row) -> str:
    return clipped(", ".join(map(str, row))) or "none"


def _list(row: Row, column: str, where: str) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise RowsError(f"{where}: column {column!r} holds {shown(value)}, not a list of turns; repair the row")
    return value
