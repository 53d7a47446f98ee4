"""Adapt turns to what a chat template can express, where a template would silently omit something."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from nybble.data.shapes import Turn
from nybble.errors import RowsError


def adapt_to_template(turns: list[Turn], tokenizer: Any, where: str) -> list[Turn]:
    """The turns with only those roles that the tokenizer's template supports: it would silently omit the others.

    If the template does not support tools, they become part of the system text; if it has no tool role, a tool's
    result becomes a user turn.
    """
    template = str(tokenizer.chat_template)
    if any(turn.calls for turn in turns) and "tool_calls" not in template:
        raise RowsError(
            f"{where}: the chat template does not support tool_calls; write the calls into the content, or set "
            "--chat_template to one that does"
        )
    if not re.search(r"""['"](tool|ipython)['"]""", template):
        turns = [replace(turn, role="user") if turn.role == "tool" else turn for turn in turns]
    if turns[0].role == "tools" and not re.search(r"\btools\b", template):
        system = f"These functions may be called, as a JSON object with name and arguments:\n{turns[0].content}"
        has_system = turns[1].role == "system"
        rest = turns[2:] if has_system else turns[1:]
        return [Turn("system", f"{turns[1].content}\n\n{system}" if has_system else system), *rest]
    return turns
