"""Read the turns of a conversation from a list of messages, whatever its keys and roles are called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nybble.data.rows import check_text
from nybble.data.shapes import Turn, check_size
from nybble.errors import RowsError
from nybble.guard import brief, shown

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_CALL_KEYS = ("tool_calls", "function_call")
# Several of these in one message must agree.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
FLAG_KEYS = ("weight", "train", "loss_mask")  # message keys that say whether a turn is learned
_USED_KEYS = {*_ROLE_KEYS, *_CONTENT_KEYS, *_CALL_KEYS, *REASONING_KEYS, *FLAG_KEYS, "name", "tool_call_id"}
_PLAIN_KEYS = {"role", "content"}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_CALLERS = ("function_call", "tool_call")  # roles whose content is a call
_ALLOWED_ROLES = ("system", "user", "assistant", "tool")
# Role -> the roles that may precede it; "" is the beginning.
_BEFORE = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("", "system", "user", "tool"),
    "tool": ("assistant", "tool"),
}


def read_turns(messages: Sequence[Any], where: str) -> list[Turn]:
    """The messages as turns, one for each.

    Raises:
        RowsError: a message is malformed; the error starts with `where` and the number of the turn.
    """
    return [_turn(message, f"{where} turn {number}") for number, message in enumerate(messages, start=1)]


def unused_keys(messages: Sequence[Any]) -> set[str]:
    """The keys that hold something in some message and that `read_turns` does not use."""
    return {
        key
        for message in messages
        if not _USED_KEYS.issuperset(message)
        for key, value in message.items()
        if key not in _USED_KEYS and not is_blank(value)
    }


def is_blank(value: Any) -> bool:
    """Whether a value holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def in_order(turns: Iterable[Turn], where: str) -> tuple[list[Turn], bool]:
    """The turns with each run of one role joined to one turn, and whether there was such a run.

    Raises:
        RowsError: the roles are out of order, no turn is an answer, or a run cannot be joined.
    """
    joined: list[Turn] = []
    number = 0
    for number, turn in enumerate(turns, start=1):
        former = joined[-1].role if joined else ""
        if former == turn.role and turn.role != "tool":
            joined[-1] = _join(joined[-1], turn, f"{where} turn {number}")
            continue
        if former not in _BEFORE[turn.role]:
            after = f"follows {former!r}" if former else "comes first"
            allowed = ", ".join(name or "the beginning" for name in _BEFORE[turn.role])
            raise RowsError(
                f"{where} turn {number}: {turn.role!r} {after}; allowed before it: {allowed}; repair the row"
            )
        joined.append(turn)
    if not any(turn.role == "assistant" for turn in joined):
        raise RowsError(
            f"{where}: has no assistant turn, so there is nothing to learn; add the answer, or remove the row"
        )
    check_size(sum(len(turn.content) + len(turn.reasoning) + len(turn.calls) for turn in joined), where)
    return joined, number > len(joined)


def _join(first: Turn, second: Turn, where: str) -> Turn:
    """Two turns of one role as one: the contents with a blank line between them, then the calls of both."""
    faults = {
        "the one is learned and the other is not": first.role == "assistant" and first.learn != second.learn,
        "they have different names": first.name != second.name,
        "the second has reasoning of its own": bool(second.reasoning),
        "the first ends with calls": bool(first.calls and second.content),
    }
    fault = next((fault for fault, is_there in faults.items() if is_there), None)
    if fault is not None:
        raise RowsError(
            f"{where}: {second.role!r} follows {second.role!r}, and they cannot be joined because {fault}; repair "
            "the row"
        )
    content = "\n\n".join(text for text in (first.content, second.content) if text)
    callers = [turn for turn in (first, second) if turn.calls]
    calls = [call for turn in callers for call in json.loads(turn.calls)]
    texts = [turn.calls_as_text for turn in callers]
    return replace(
        first,
        content=content,
        calls=json.dumps(calls, ensure_ascii=False) if calls else "",
        calls_as_text="\n\n".join(texts) if all(texts) else "",
    )


def _turn(message: Any, where: str) -> Turn:
    if type(message) is dict and message.keys() == _PLAIN_KEYS:  # most messages need no further look
        role, content = message["role"], message["content"]
        if role in _ALLOWED_ROLES and type(content) is str:
            check_text(content, where)
            return Turn(role, content)
    keys = message.keys() if isinstance(message, Mapping) else ()
    role_key = next((key for key in _ROLE_KEYS if key in keys), None)
    content_key = next((key for key in _CONTENT_KEYS if key in keys), "content")
    if role_key is None or not (content_key in keys or any(key in keys for key in _CALL_KEYS)):
        raise RowsError(f"{where}: needs 'role' and 'content', got {shown(message)}; repair the row")
    given = message[role_key]
    name = given.strip().lower() if isinstance(given, str) else ""
    role = _ROLES.get(name)
    if role is None:
        raise RowsError(f"{where}: unknown role {shown(given)}; allowed: {', '.join(_ALLOWED_ROLES)}")
    content = message.get(content_key)
    calls = _calls(message, where)
    as_text = ""
    if name in _CALLERS and not calls and _holds_calls(content):
        calls = _as_calls(content, where)
        as_text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        content = ""
    if calls and content is None:
        content = ""
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowsError(f"{where}: {content_key} is of type {type(content).__name__}, not text; repair the row")
    check_text(content, where)
    return Turn(
        role=role,
        content=content,
        calls=json.dumps(calls, ensure_ascii=False) if calls else "",
        calls_as_text=as_text,
        reasoning=_reasoning(message, where),
        name=_word(message, "name", where),
        tool_call_id=_word(message, "tool_call_id", where),
        learn=all(read_flag(message[key], f"{where}: {key}") for key in FLAG_KEYS if message.get(key) is not None),
    )


def _text_part(part: Any, where: str) -> str:
    """The text of one part of a message's content, which is `{"type": "text", "text": ..}` or only the text."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if re.search("image|video|audio", str(kind)):
            raise RowsError(
                f"{where}: a part of the content is {shown(kind)}; only text is learned, so leave such rows out "
                "(--on_bad_row skip)"
            )
        raise RowsError(
            f"{where}: a part of the content is {shown(kind)}; allowed is only {{'type': 'text', 'text': '..'}}"
        )
    return text


def _calls(message: Mapping[str, Any], where: str) -> list[Any]:
    return [
        call for key in _CALL_KEYS if not is_blank(message.get(key)) for call in _as_calls(message[key], where, key)
    ]


def _holds_calls(content: Any) -> bool:
    """Whether a content is a call or a list of calls, as objects or as JSON text."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):  # words, or calls in the form of some template
            return False
    calls = content if isinstance(content, list) else [content]
    return bool(calls) and all(isinstance(call, Mapping) and ("name" in call or "function" in call) for call in calls)


def _as_calls(value: Any, where: str, key: str = "the call") -> list[Any]:
    """One call or a list of calls, as objects or as JSON text, in the form that chat templates expect:
    `{"type": "function", "function": {"name": .., "arguments": {..}}}`."""
    calls = parse_json(value, f"{where}: {key}") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) for call in calls):
        raise RowsError(f"{where}: {key} holds {shown(value)}, not calls as objects; repair the row")
    return [_with_arguments(as_function(call, "arguments")) for call in calls]


def _with_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with an empty object for arguments that are null, empty text or absent; templates would print them."""
    function = call.get("function")
    if not isinstance(function, Mapping) or function.get("arguments") not in (None, ""):
        return call
    return {**call, "function": {**function, "arguments": {}}}


def as_function(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A call, or the definition of a function, with its name inside `function`, and what is under `key` as an object
    if it is the JSON text of one."""
    inner = value.get("function")
    if not isinstance(inner, Mapping):
        if "name" not in value or inner is not None:
            return value
        inner = {name: value[name] for name in ("name", "description", "arguments", "parameters") if name in value}
        value = {"type": "function"} | {name: item for name, item in value.items() if name not in inner}
    text = inner.get(key)
    if isinstance(text, str):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):  # a text that is no JSON is the argument itself
            parsed = None
        inner = {**inner, key: parsed} if isinstance(parsed, dict) else inner
    return {**value, "function": inner}


def parse_json(text: str, what: str) -> Any:
    """Parse JSON that a row holds as text.

    Raises:
        RowsError: it is no JSON; the message starts with `what`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowsError(f"{what} is not valid JSON ({brief(error)}); repair the row") from error


def _reasoning(message: Mapping[str, Any], where: str) -> str:
    found = {text: key for key in REASONING_KEYS if (text := _word(message, key, where))}
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


def read_flag(value: Any, where: str, column: str = "") -> bool:
    """Whether what has this flag is learned; a flag from a `column` may be something else of the same name.

    Raises:
        RowsError: the flag is neither 0 nor 1.
    """
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    advice = f"; if it is no flag, set --ignore_columns {column}" if column else ""
    raise RowsError(
        f"{where} is {shown(value)}; allowed are 0 and false (not learned) and 1 and true (learned){advice}"
    )
