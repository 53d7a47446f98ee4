"""The kinds of learned tokens: reasoning, the answer's words, tool calls, the end of the turn, and other text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.data.messages import Parts

KINDS = ("reasoning", "answer", "call", "end", "text")  # "text" is learned under loss_on: all
Span = tuple[int, int, str]  # first token, end, kind

_CLOSING = re.compile(r"\s*</think>\s*")


def spans_of(completion: str, ends: Sequence[int], parts: Parts, calls: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The parts of a completion as spans of its tokens, in order; the last token ends the turn.

    Args:
        completion: the text that generation has to produce.
        ends: for each token, the end of its characters in the completion.
        parts: what the turn says.
        calls: the calls that it makes.
    """
    is_plain = not calls and not parts.closing and "</think>" not in completion
    begins = [(0, "answer")] if is_plain else _begins(completion, parts, calls)
    last = len(ends) - 1
    borders = [*(min(bisect_right(ends, at) if at else 0, last) for at, _kind in begins), last]
    spans = [(borders[i], borders[i + 1], kind) for i, (_at, kind) in enumerate(begins)]
    return [span for span in [*spans, (last, last + 1, "end")] if span[0] < span[1]]


def _begins(completion: str, parts: Parts, calls: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Where each part of a completion begins, in characters; the first begins at 0."""
    reasoning = parts.reasoning.strip()
    words = parts.words.strip()
    name = str(calls[0].get("function", calls[0]).get("name", "")) if calls else ""
    closing = _CLOSING.search(completion) if parts.closing and "</think>" not in reasoning else None
    if closing:  # short texts may stand within the tags themselves
        thought, closed = closing.start(), closing.end()
    else:
        thought = closed = max(completion.find(reasoning), 0) + len(reasoning) if parts.closing else 0
    said = completion.find(words, closed) if words else -1
    called = completion.find(name, said + len(words) if said >= 0 else closed) if calls else -1
    is_called_first = bool(calls) and called < 0 <= said
    following = completion.find(name, closed) if is_called_first else said if said >= 0 else called
    closings = list(_CLOSING.finditer(completion, thought, following if following >= 0 else len(completion)))
    # What a template writes between the reasoning and the words belongs to the reasoning.
    answer = closings[-1].end() if closings else 0
    if parts.closing and not closings:
        answer = thought if is_called_first or said < 0 else said
    begins = [(0, "reasoning")] if answer else []
    if is_called_first:
        return [*begins, (answer, "call"), (said, "answer")]
    if words or not calls:
        begins.append((answer, "answer"))
    if calls:
        begins.append((said + len(words) if words else answer, "call"))
    return begins
