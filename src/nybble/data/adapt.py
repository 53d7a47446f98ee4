"""Adapt turns to what a chat template can express, where it would fail or silently omit something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from nybble.data.shapes import Turn
from nybble.data.templates import render_chat
from nybble.errors import RowsError

_PROBE = "kaqx"  # occurs in no template


def adapt_to_template(turns: Sequence[Turn], tokenizer: Any, where: str) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns with only those roles that the tokenizer's template supports, and notes of what was changed.

    If the template does not support tools, they become part of the system text; if it has no tool role, the results of
    tools become a user turn; if it has no place for a system text, that comes before the first question.

    Raises:
        RowsError: the turns hold calls, which the template does not support.
    """
    template = str(tokenizer.chat_template)
    adapted = list(turns)
    notes: list[str] = []
    if any(turn.calls for turn in turns) and "tool_calls" not in template:
        if not all(turn.calls_as_text for turn in turns if turn.calls):
            raise RowsError(
                f"{where}: the chat template does not support tool_calls; write the calls into the content, or set "
                "--chat_template to one that does"
            )
        adapted = [_calls_as_content(turn) for turn in turns]
        notes.append("calls learned as the text that the row has")
    if any(turn.role == "tool" for turn in turns) and not _takes_results(tokenizer, template):
        adapted = _results_as_questions(adapted)
        notes.append("results of tools put into user turns")
    if adapted[0].role == "tools" and not re.search(r"\btools\b", template):
        system = f"These functions may be called, as a JSON object with name and arguments:\n{adapted[0].content}"
        has_system = adapted[1].role == "system"
        rest = adapted[2:] if has_system else adapted[1:]
        adapted = [Turn("system", f"{adapted[1].content}\n\n{system}" if has_system else system), *rest]
        notes.append("tools put into the system text")
    at = next((k for k, turn in enumerate(adapted) if turn.role == "system"), None)
    if at is None or takes_system(tokenizer, template):
        return adapted, tuple(notes)
    notes.append("system text put before the first question")
    system = adapted.pop(at).content
    if at == len(adapted) or adapted[at].role != "user":
        adapted.insert(at, Turn("user", system))
    else:
        adapted[at] = replace(adapted[at], content=f"{system}\n\n{adapted[at].content}")
    return adapted, tuple(notes)


def _calls_as_content(turn: Turn) -> Turn:
    content = "\n\n".join(text for text in (turn.content, turn.calls_as_text) if text)
    return replace(turn, content=content, calls="", calls_as_text="")


def _results_as_questions(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with each run of results as one user turn."""
    adapted: list[Turn] = []
    former = ""
    for turn in turns:
        if turn.role == former == "tool":
            adapted[-1] = replace(adapted[-1], content=f"{adapted[-1].content}\n\n{turn.content}")
        else:
            adapted.append(replace(turn, role="user") if turn.role == "tool" else turn)
        former = turn.role
    return adapted


@lru_cache(maxsize=8)
def takes_system(tokenizer: Any, template: str) -> bool:
    """Whether the tokenizer's template, which is `template`, writes a system text."""
    return _writes(tokenizer, [("system", _PROBE), ("user", "a"), ("assistant", "b")])


@lru_cache(maxsize=8)
def _takes_results(tokenizer: Any, template: str) -> bool:
    """Whether the tokenizer's template, which is `template`, has a role for the results of tools."""
    if re.search(r"""['"](tool|ipython)['"]""", template):
        return True
    # A template with calls may write every role by its name; one without calls does so with roles that it never meant.
    chat = [("user", "a"), ("assistant", "b"), ("tool", _PROBE)]
    return "tool_calls" in template and _writes(tokenizer, chat)


def _writes(tokenizer: Any, chat: Sequence[tuple[str, str]]) -> bool:
    """Whether the tokenizer's template writes the probe in one of the turns, which are roles with contents."""
    for is_list in (False, True):
        turns = [{"role": role, "content": [{"type": "text", "text": c}] if is_list else c} for role, c in chat]
        try:
            text = render_chat(tokenizer, turns, "a probe")
        except RowsError:  # this template refuses such a turn, or text that is not a list of parts
            text = ""
        if _PROBE in text:
            return True
    return False
