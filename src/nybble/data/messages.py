"""Turns as the messages that a chat template takes.

Templates differ in what they accept: arguments of a call as an object or as JSON text, reasoning in a field or in the
content, a call without words with an empty content or with none, content as text or as a list of parts. A `Style` is
one choice of these. Which one serves is found by rendering: the first that a template prints without loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from nybble.data.chats import REASONING_KEYS
from nybble.data.shapes import Turn
from nybble.data.templates import render_chat

# Line breaks next to a tag belong to the tag. A template that prompts with the opening tag expects answers without it.
_TAGGED = re.compile(r"(\s*<think>\n*)(.*?)(\n*</think>\n*)(.*)", re.DOTALL)
_CLOSED = re.compile(r"(\s*(?:<think>\n*)?)(.*?)(\n*</think>\n*)(.*)", re.DOTALL)

_MENTIONED = re.compile(r"""<think>|["'`]\Z""")  # before a closing tag: it is spoken of, and ends no reasoning


@dataclass(frozen=True)
class Style:
    """How turns are written as messages."""

    content_as_parts: bool = False  # else as text
    reasoning_inline: bool = False  # else in a field of its own
    arguments_as_text: bool = False  # else as objects
    wordless: str | None = ""  # the content of a call without words


class Parts(NamedTuple):
    """What an assistant's turn says; joined, these are its content with the reasoning inline."""

    opening: str
    reasoning: str
    closing: str
    words: str


def parts_of(turn: Turn, template: str) -> Parts:
    """The reasoning of a turn, from its field or from tags in its content, and its words."""
    if turn.reasoning:
        return Parts("<think>\n", turn.reasoning, "\n</think>\n\n", turn.content)
    if turn.role == "assistant" and "</think>" in turn.content:
        match = (_CLOSED if "</think>" in template else _TAGGED).fullmatch(turn.content)
        if match and ("<think>" in match[1] or not _MENTIONED.search(match[2])):
            return Parts(*match.groups())
    return Parts("", "", "", turn.content)


def without_reasoning(turn: Turn, template: str) -> Turn:
    """The turn with its words alone."""
    return replace(turn, content=parts_of(turn, template).words, reasoning="")


def styles(turns: Sequence[Turn], template: str) -> Iterator[Style]:
    """The styles in which these turns differ for this template, the usual one first."""
    calls = [turn for turn in turns if turn.calls]
    thinkers = [turn for turn in turns if parts_of(turn, template).closing]
    is_tagged = "</think>" in template or not all(turn.reasoning for turn in thinkers)
    inline = [False]
    if thinkers and is_tagged:
        inline = [False, True] if any(key in template for key in REASONING_KEYS) else [True]
    choices = product(
        [False, True] if "type" in template else [False],
        inline,
        [False, True] if calls else [False],
        ["", None] if any(not turn.content for turn in calls) else [""],
    )
    for content_as_parts, reasoning_inline, arguments_as_text, wordless in choices:
        yield Style(content_as_parts, reasoning_inline, arguments_as_text, wordless)


def render_turns(turns: Sequence[Turn], tokenizer: Any, where: str, asks: bool = False, style: Style = Style()) -> str:
    """Render turns with the tokenizer's template; with `asks`, up to where the answer begins."""
    tools = json.loads(turns[0].content) if turns and turns[0].role == "tools" else None
    template = str(tokenizer.chat_template)
    messages = [_message(turn, template, style) for turn in turns if turn.role != "tools"]
    return render_chat(tokenizer, messages, where, tools, asks)


def _message(turn: Turn, template: str, style: Style) -> dict[str, Any]:
    """The turn as chat templates expect it; a key is only there if the turn has something to say under it."""
    parts = parts_of(turn, template)
    words: str | None = turn.content
    reasoning = ""
    if parts.closing and not style.reasoning_inline:
        words = parts.words
        reasoning = parts.reasoning
    elif parts.closing:
        words = parts.opening + parts.reasoning + parts.closing + parts.words
    if not words and turn.calls:
        words = style.wordless
    content = [{"type": "text", "text": words}] if style.content_as_parts and words is not None else words
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.calls:
        message["tool_calls"] = [_call(call, style) for call in json.loads(turn.calls)]
    if reasoning:
        message |= dict.fromkeys(REASONING_KEYS, reasoning)  # no template reads more than one of them
    named = {"name": turn.name, "tool_call_id": turn.tool_call_id}
    return message | {key: text for key, text in named.items() if text}


def _call(call: Any, style: Style) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if style.arguments_as_text and arguments is not None and not isinstance(arguments, str):
        function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"type": "function", **call, "function": function}
