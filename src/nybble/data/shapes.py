"""Convert a row of any supported shape to one of two forms.

    pieces    text in which the answers are already marked: [INST] text, prompt + completion, plain text
    turns     messages with roles: messages, sharegpt, alpaca; a chat template will render them

The columns of the first row determine the shape; a later row with other columns is an error that names its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.files import Row
from nybble.data.rendered import find_answers, with_system, without_stop
from nybble.data.rows import Rows, check_text
from nybble.errors import RowsError
from nybble.guard import brief, clipped, shown
from nybble.recipe import DataSection


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
    reasoning: str = ""  # what an assistant thinks before it answers
    name: str = ""  # of the speaker, or of the function whose result a tool turn is
    tool_call_id: str = ""  # the id of the call whose result a tool turn is
    learn: bool = True  # whether the loss may count this turn; only an assistant's turns are learned


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
# Role -> the roles that may precede it; "" is the beginning.
_BEFORE = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("", "system", "user", "tool"),
    "tool": ("assistant", "tool"),
}
_MOST_CHARACTERS = 2_000_000  # longer than any context; tokenizing more takes gigabytes and minutes
# Message keys that hold an assistant's reasoning; several in one message must agree.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_FLAG_KEYS = ("weight", "train", "loss_mask")  # message keys that say whether a turn is learned
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
    """The shape of the rows according to the columns of the first row.

    Raises:
        RowsError: the columns belong to no supported shape.
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
        RowsError: a column is missing or has the wrong type; the message starts with `where`.
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
    prompt, header, answer = text.partition(_RESPONSE)
    if header and _RESPONSE not in answer:
        prompt = prompt.removeprefix("<s>") + header
        return [Piece(prompt + answer.removesuffix("</s>"), len(prompt), prompt_form="alpaca")]
    pieces = []
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


def _alpaca(row: Row, where: str, has_template: bool) -> Form:
    instruction = _text(row, "instruction", where)
    output = _text(row, "output", where)
    extra = _text(row, "input", where) if row.get("input") else ""
    if has_template:
        return [Turn("user", f"{instruction}\n\n{extra}" if extra else instruction), Turn("assistant", output)]
    prompt = alpaca_prompt(instruction, extra)
    return [Piece(prompt + output, len(prompt), is_literal=True, prompt_form="alpaca")]


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


def _tools(row: Row, where: str) -> list[Turn]:
    """The functions in column `tools`, which holds JSON text or a list, as a turn of their own."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowsError(f"{where}: column 'tools' is not valid JSON ({brief(error)}); repair the row") from error
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RowsError(
            f"{where}: column 'tools' is of type {type(tools).__name__}, not a list of functions; repair the row"
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
            raise RowsError(
                f"{where} turn {number}: {turn.role!r} {after}; allowed before it: {allowed}; repair the row"
            )
        turns.append(turn)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowsError(
            f"{where}: has no assistant turn, so there is nothing to learn; add the answer, or remove the row"
        )
    _check_size(sum(len(turn.content) for turn in turns), where)
    return turns


def _turn(message: Any, role_key: str, content_key: str, where: str) -> Turn:
    if not isinstance(message, Mapping) or role_key not in message or not {content_key, "tool_calls"} & message.keys():
        raise RowsError(f"{where}: needs {role_key!r} and {content_key!r}, got {shown(message)}; repair the row")
    role = message[role_key]
    content = message.get(content_key)
    calls = message.get("tool_calls")
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
    return Turn(
        role=role,
        content=content,
        calls=json.dumps(calls, ensure_ascii=False) if calls else "",
        reasoning=_reasoning(message, where),
        name=_word(message, "name", where),
        tool_call_id=_word(message, "tool_call_id", where),
        learn=all(_flag(message[key], f"{where}: {key}") for key in _FLAG_KEYS if message.get(key) is not None),
    )


def _reasoning(message: Mapping[str, Any], where: str) -> str:
    found = {text: key for key in _REASONING_KEYS if (text := _word(message, key, where))}
    if len(found) > 1:
        raise RowsError(f"{where}: {' and '.join(found.values())} hold different texts; keep one of them")
    return next(iter(found), "")


def _word(message: Mapping[str, Any], key: str, where: str) -> str:
    """The text under `key`, or "" if the message has none."""
    value = message.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowsError(f"{where}: {key} is of type {type(value).__name__}, not text; repair the row")
    check_text(value, where)
    return value


def _flag(value: Any, where: str) -> bool:
    """Whether a turn with this flag is learned.

    Raises:
        RowsError: the flag is neither 0 nor 1.
    """
    if value in (0, 1):
        return bool(value)
    raise RowsError(f"{where} is {shown(value)}; allowed are 0 and false (not learned) and 1 and true (learned)")


def _text_part(part: Any, where: str) -> str:
    """The text of one part of a message's content, which is `{"type": "text", "text": ..}` or only the text."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RowsError(
            f"{where}: a part of the content is {shown(kind)}; allowed is only {{'type': 'text', 'text': '..'}}"
        )
    return text


def _check_size(n_characters: int, where: str) -> None:
    if n_characters > _MOST_CHARACTERS:
        raise RowsError(
            f"{where}: the text has {n_characters:,} characters; at most {_MOST_CHARACTERS:,} are allowed; split it "
            "into several rows"
        )


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise RowsError(f"{where}: column {column!r} is missing; the row has {_columns(row)}; repair the row")
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
