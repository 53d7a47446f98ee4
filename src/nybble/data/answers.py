"""What generation is given, and what it has to produce, for each answer of a conversation.

The context of an answer is the chat template's text of the turns before it, with the generation prompt. The completion
is what the template writes behind that text once the answer is there. `Conversation` renders both as text; nothing here
knows tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from nybble.data.messages import Parts, Style, parts_of, render_turns
from nybble.data.shapes import Turn
from nybble.data.tokens import MARKS
from nybble.errors import RowsError
from nybble.guard import shown

_OPENED = re.compile(r"<think>\s*\Z")  # ends a prompt after which the model begins by reasoning
_CLOSED = re.compile(r"<think>\s*</think>\s*\Z")  # ends a prompt after which the model answers without reasoning

# A content in parts, as Python or JSON prints it.
_PARTS = re.compile(r"""\{(['"])type\1: ?\1text\1, ?\1text\1: ?['"]""")


class LostError(RowsError):
    """The template renders the turns, but leaves out something that they say."""


class Conversation:
    """The turns of a row as a chat template renders them; every text contains the marks of `tokens.mark`."""

    def __init__(self, turns: Sequence[Turn], tokenizer: Any, where: str, style: Style, sign: str) -> None:
        """Args:
        turns: the turns, with marks in their texts.
        tokenizer: a fast tokenizer of transformers.
        where: the row's place, which starts each error message.
        style: how the turns are written as messages.
        sign: the mark; "" if no text needs one.

        Raises:
            RowsError: the template cannot render the turns in this style.
        """
        self.turns = turns
        self._tokenizer = tokenizer
        self._where = where
        self._style = style
        self._sign = sign
        self._template = str(tokenizer.chat_template)
        self._answers: dict[int, tuple[str, str]] = {}
        self.text = self._render(len(turns))
        is_spelled = any(_PARTS.search(turn.content) for turn in turns)
        if style.content_as_parts and not is_spelled and _PARTS.search(self.text):
            raise RowsError(
                f"{where}: the chat template writes a content in parts as an object, not as its text; set "
                "--chat_template to another one"
            )
        calls = [call for turn in turns for call in calls_of(turn)]
        if not style.arguments_as_text and any(_is_python(call, self.text) for call in calls):
            raise RowsError(
                f"{where}: the chat template writes the arguments of calls as Python objects, not as JSON; set "
                "--chat_template to another one"
            )

    def parts(self, k: int) -> Parts:
        """What turn `k` says."""
        return parts_of(self.turns[k], self._template)

    def is_first(self, k: int) -> bool:
        """Whether nothing precedes turn `k` that a template could render."""
        return all(turn.role == "tools" for turn in self.turns[:k])

    def answer(self, k: int) -> tuple[str, str]:
        """The context of answer `k` and its completion.

        Raises:
            RowsError: the template writes something else than the answer behind the generation prompt.
        """
        if k not in self._answers:
            self._answers[k] = self._find_answer(k)
        return self._answers[k]

    def _find_answer(self, k: int) -> tuple[str, str]:
        newest = self._render(k + 1)
        if self.is_first(k):
            return self._find_first_answer(k, newest)
        asked = self._render(k, asks=True)
        if _CLOSED.search(asked) and self.parts(k).closing:
            raise RowsError(
                f"{self._where}: the generation prompt of the chat template ends the reasoning before the answer, so "
                "the reasoning of this row would never be generated; set --reasoning drop, or --chat_template to "
                "another one"
            )
        if newest.startswith(asked):
            return asked, newest[len(asked) :]
        opened = _OPENED.search(asked)
        if opened and newest.startswith(asked[: opened.start()]):
            return asked, self._after_opening(k, newest[opened.start() :])
        before = self._render(k)
        header = asked[len(before) :] if asked.startswith(before) else ""
        completion = self._after_header(k, newest, header) if header.strip() else None
        if completion is not None:
            return asked, completion
        raise self._cannot_be_located(k)

    def _find_first_answer(self, k: int, newest: str) -> tuple[str, str]:
        """The header and the completion of an answer that nothing precedes: templates cannot render an empty chat."""
        question = [*self.turns[:k], Turn("user", "a")]
        before = self._render_other(question)
        asked = self._render_other(question, asks=True)
        header = asked[len(before) :] if asked.startswith(before) else ""
        completion = self._after_header(k, newest, header) if header.strip() else None
        if completion is not None:
            return newest[: len(newest) - len(completion)], completion
        # Without a header behind a question, it ends where two contents make the results differ.
        a, b = (self._render_other([*self.turns[:k], Turn("assistant", content)]) for content in ("a", "b"))
        n_header = n_common(a, b)
        if not newest.startswith(a[:n_header]):
            raise self._cannot_be_located(k)
        return newest[:n_header], newest[n_header:]

    def _cannot_be_located(self, k: int) -> RowsError:
        return RowsError(
            f"{self._where}: the chat template does not write the answer of turn {k + 1} behind its generation prompt, "
            "so what is to be learned cannot be located; set --chat_template to another one, or --loss_on all"
        )

    def _after_opening(self, k: int, rest: str) -> str:
        """The completion after a prompt that opens the reasoning, where the template closes it or leaves it out."""
        if rest.lstrip().startswith("<think>"):
            return rest.lstrip().removeprefix("<think>").lstrip()
        parts = self.parts(k)
        if not parts.closing:
            return f"\n</think>\n\n{rest.lstrip()}"
        return parts.reasoning + parts.closing + rest.lstrip()

    def _after_header(self, k: int, newest: str, header: str) -> str | None:
        """What follows the last header behind which all of answer `k` is found, in a text with another beginning."""
        at = newest.rfind(header)
        while at >= 0:
            is_typed = at > 0 and ord(newest[at - 1]) in MARKS  # it is spelled out in a turn's content
            if not is_typed and self.lost(k, newest[at + len(header) :]) is None:
                return newest[at + len(header) :]
            at = newest.rfind(header, 0, at)
        return None

    def lost(self, k: int, text: str) -> str | None:
        """What turn `k` says that is not in `text`, in words; None if all is there."""
        turn = self.turns[k]
        text = self._plain(text)
        parts = self.parts(k)
        if turn.role == "tools":
            return next((f"the tool {shown(name)}" for name in tool_names(turn) if name not in text), None)
        if parts.closing and not contains(text, self._plain(parts.reasoning)):
            return f"the reasoning {shown(self._plain(parts.reasoning).strip())}"
        thought = self._plain(parts.reasoning).strip()
        if parts.closing and thought in text:  # words that repeat the reasoning do not stand for it
            text = text[text.index(thought) + len(thought) :]
        if not contains(text, self._plain(parts.words)):
            return f"the words {shown(self._plain(parts.words).strip())}"
        at = 0
        for call in calls_of(turn):
            function = call.get("function", call)
            name = str(function.get("name", ""))
            at = _find(text, self._plain(name), at) + 1  # a second call of the same function stands behind the first
            if at == 0 or any(_find(text, self._plain(word)) < 0 for word in _words_of(function.get("arguments"))):
                return f"the call of {shown(name)}"
        return None

    def refusal(self, k: int, what: str) -> LostError:
        """The error that the template leaves out `what` of turn `k`."""
        turn = self.turns[k]
        speaker = {"assistant": "an answer", "tools": "the tools"}.get(turn.role, f"a {turn.role} turn")
        advice = "set --chat_template to one that writes it"
        if what.startswith("the reasoning"):
            advice = "set --reasoning drop to train without it, or --chat_template to one that writes it"
        return LostError(f"{self._where}: the chat template leaves out {what} of {speaker}; {advice}")

    def gaps(self) -> Mapping[int, tuple[int, int, tuple[str, str]]]:
        """For each turn: where its content, without surrounding white space, is in the text, and the text on both sides
        of it up to the content of the neighbouring turns. Empty if the template changes the contents."""
        sign = next(chr(code) for code in MARKS if chr(code) not in self.text)
        spoken = [k for k, turn in enumerate(self.turns) if turn.role != "tools"]
        marked = list(self.turns)
        for k in spoken:
            words = marked[k].content.strip()
            marked[k] = replace(marked[k], content=marked[k].content.replace(words, sign + words + sign, 1))
        try:
            parts = self._render_other(marked).split(sign)
        except RowsError:  # a template may parse a turn's content and fail because of the marks
            return {}
        if len(parts) != 2 * len(spoken) + 1 or "".join(parts) != self.text:
            return {}
        ends = list(accumulate(map(len, parts)))
        return {k: (ends[2 * i], ends[2 * i + 1], (parts[2 * i], parts[2 * i + 2])) for i, k in enumerate(spoken)}

    def _plain(self, text: str) -> str:
        return text.replace(self._sign, "") if self._sign else text

    def _render(self, upto: int, asks: bool = False) -> str:
        if upto == len(self.turns) and not asks and hasattr(self, "text"):
            return self.text
        return self._render_other(self.turns[:upto], asks)

    def _render_other(self, turns: Sequence[Turn], asks: bool = False) -> str:
        return render_turns(turns, self._tokenizer, self._where, asks, self._style)


def calls_of(turn: Turn) -> list[Mapping[str, Any]]:
    """The calls that a turn makes, each with a name and arguments or with these under "function"."""
    calls = json.loads(turn.calls) if turn.calls else []
    return [call for call in calls if isinstance(call, dict)]


def tool_names(turn: Turn) -> list[str]:
    """The names of the functions that a turn with tools defines."""
    functions = [tool.get("function", tool) for tool in json.loads(turn.content) if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def contains(text: str, words: str) -> bool:
    """Whether `text` contains the words, as they are, escaped as in JSON, or with other white space."""
    if _find(text, words) >= 0:
        return True
    # A template that takes a spelled </think> for the end of reasoning inserts white space there.
    return "</think>" not in words and "".join(words.split()) in "".join(text.split())


def _find(text: str, words: str, start: int = 0) -> int:
    words = words.strip()
    found = text.find(words, start)
    if found >= 0:
        return found
    escaped = (json.dumps(words, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return max(text.find(form, start) for form in escaped)


def _words_of(arguments: Any) -> Iterator[str]:
    """Each key, text and number in the arguments of a call."""
    waiting = [arguments]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            yield value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield json.dumps(value)


def _is_python(call: Mapping[str, Any], text: str) -> bool:
    """Whether the text shows the arguments of a call as Python prints a dictionary."""
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    shown_as = str(arguments)
    return isinstance(arguments, dict) and bool(arguments) and shown_as in text and shown_as != json.dumps(arguments)


def n_common(a: str, b: str) -> int:
    """The length of the longest common beginning."""
    if b.startswith(a):
        return len(a)
    low = 0
    high = min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
