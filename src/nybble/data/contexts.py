"""Conversations as token ids: each answer behind the context in which generation meets it.

If the chat template renders earlier turns as it rendered them before, all contexts are beginnings of one text, and the
conversation is one sequence (`_in_one`). If it rewrites them (drops their reasoning, ends the last answer differently),
each answer has a context of its own (`_alone`). Ids of a context are always those of its text alone, as in generation.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from nybble.data.adapt import adapt_to_template
from nybble.data.answers import Conversation, LostError, calls_of, n_common
from nybble.data.kinds import Span, spans_of
from nybble.data.messages import Parts, parts_of, styles, without_reasoning
from nybble.data.shapes import Turn
from nybble.data.tokens import (
    adds_bos,
    mark,
    special_tokens,
    tokenize,
    tokenize_behind,
    unmark,
)
from nybble.errors import RowsError

_MOST_SEARCHED = 1000  # answers of one row; locating each renders all turns before it, and 1,000 take about 20 s
_PRINTED = ("content", "reasoning", "calls", "name", "tool_call_id")  # what a template may print of a turn
_WINDOW = 48  # characters before an answer that are tokenized again to see whether its border changes their tokens


@dataclass(frozen=True)
class Answer:
    """One answer to learn, as tokens of its context."""

    first: int
    end: int
    has_stop: bool  # its last token ends the turn
    is_empty: bool  # it says nothing but white space
    spans: Sequence[Span]  # its learned tokens by kind


@dataclass(frozen=True)
class Context:
    """Token ids with the answers that are learned in them."""

    ids: list[int]
    answers: Sequence[Answer]


def encode_turns(
    turns: Sequence[Turn], tokenizer: Any, loss_on: str = "answers", reasoning: str = "learn", where: str = ""
) -> tuple[list[Context], tuple[str, ...]]:
    """The contexts of a conversation: one, or one for each learned answer; and notes of what was changed in it.

    Args:
        turns: the turns of the row.
        tokenizer: a fast tokenizer of transformers.
        loss_on: as the setting of this name; under "all" there is one context.
        reasoning: as the setting of this name.
        where: the row's place, which starts each error message.

    Raises:
        RowsError: the chat template cannot render the turns, or leaves out something that they say.
    """
    template = str(tokenizer.chat_template)
    if reasoning == "drop":
        turns = [without_reasoning(turn, template) for turn in turns]
    turns, notes = adapt_to_template(turns, tokenizer, where)
    marked, sign = mark_turns(turns, tokenizer, template)
    fault: RowsError | None = None
    for style in styles(marked, template):
        try:
            encoder = _Encoder(Conversation(marked, tokenizer, where, style, sign), tokenizer, sign, where)
            return encoder.contexts(loss_on, reasoning), notes
        except RowsError as error:
            # That something is left out says more than that the template fails on another style.
            if fault is None or (isinstance(error, LostError) and not isinstance(fault, LostError)):
                fault = error
    raise RowsError(str(fault))


def n_tokens(turns: Sequence[Turn], tokenizer: Any) -> int:
    """The number of tokens of a conversation as the chat template renders it as a whole."""
    marked, sign = mark_turns(adapt_to_template(turns, tokenizer, "")[0], tokenizer, str(tokenizer.chat_template))
    for style in styles(marked, str(tokenizer.chat_template)):
        try:
            return len(prompt_ids(Conversation(marked, tokenizer, "", style, sign).text, sign, tokenizer))
        except RowsError:
            continue
    return 0


def prompt_ids(text: str, sign: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered text with marks, with exactly one begin token if the tokenizer adds one."""
    return _tokenize(text, sign, tokenizer)[0]


def _tokenize(text: str, sign: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    text, as_text = unmark(text, sign)
    ids, ends = tokenize(text, tokenizer, as_text)
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id, *ids], [0, *ends]
    return ids, ends


def mark_turns(turns: Sequence[Turn], tokenizer: Any, template: str) -> tuple[list[Turn], str]:
    """The turns with a mark before each control token that their texts spell, and the mark."""
    texts = [text for turn in turns for text in (getattr(turn, name) for name in _PRINTED)]
    marked, sign = mark(texts, tokenizer)
    if not sign:
        return list(turns), ""
    fields = iter(marked)
    changed: list[Turn] = []
    for turn in turns:
        texts_of_turn: dict[str, Any] = {name: next(fields) for name in _PRINTED}
        changed.append(replace(turn, **texts_of_turn))
    # The tags of reasoning in a content are meant as tags, whether or not they are control tokens.
    for k, turn in enumerate(turns):
        if parts_of(turn, template).closing and not turn.reasoning:
            content = re.sub(f"{sign}(</?think>)", r"\1", changed[k].content)
            changed[k] = replace(changed[k], content=content)
    return changed, sign


class _Encoder:
    """Locates the answers of one conversation in token ids."""

    def __init__(self, conversation: Conversation, tokenizer: Any, sign: str, where: str) -> None:
        self._conversation = conversation
        self._turns = conversation.turns
        self._tokenizer = tokenizer
        self._sign = sign
        self._where = where
        self._special = special_tokens(tokenizer)

    def contexts(self, loss_on: str, reasoning: str) -> list[Context]:
        """The contexts with the answers that the settings choose."""
        chosen = [k for k, turn in enumerate(self._turns) if turn.role == "assistant"]
        if loss_on == "all" and not all(self._turns[k].learn for k in chosen):
            raise RowsError(
                f"{self._where}: flags turns that are not to be learned, but loss_on is all; set --loss_on answers"
            )
        chosen = [k for k in chosen[-1 if loss_on == "last_answer" else 0 :] if self._turns[k].learn]
        if loss_on == "tool_calls":
            chosen = [k for k in chosen if self._turns[k].calls]
        if loss_on == "content":
            chosen = [k for k in chosen if self._turns[k].content.strip() or not self._turns[k].calls]
        context = self._whole(chosen) if loss_on == "all" else self._in_one(chosen)
        contexts = [context] if context else [self._alone(k) for k in self._limited(chosen)]
        self._check_rest(chosen)
        if reasoning != "mask" and loss_on not in ("tool_calls", "content"):
            return contexts
        return [replace(c, answers=[_chosen(a, loss_on, reasoning) for a in c.answers]) for c in contexts]

    def _whole(self, chosen: Sequence[int]) -> Context:
        """The whole conversation, with its answers if they can be located in it."""
        conversation = self._conversation
        for k in chosen:
            self._check(k, conversation.text)
        try:
            found = self._in_one(chosen)
        except RowsError:  # the template does not write the answers behind its generation prompt
            found = None
        if found:
            return found
        ids, ends = _tokenize(conversation.text, self._sign, self._tokenizer)
        end = self._end(ids, ends, unmark(conversation.text, self._sign)[0])
        ids = ids if end else [*ids, self._tokenizer.eos_token_id]
        stop = (end or len(ids)) - 1
        return Context(ids, [Answer(0, stop + 1, True, False, [(0, stop, "text"), (stop, stop + 1, "end")])])

    def _in_one(self, chosen: Sequence[int]) -> Context | None:
        """The whole conversation as one context; None if an answer's own context is no beginning of it.

        Answers between the same two gaps have the same borders relative to them, so only the first of each kind is
        searched.
        """
        conversation = self._conversation
        text = conversation.text
        ids, ends = _tokenize(text, self._sign, self._tokenizer)
        plain, _as_text = unmark(text, self._sign)
        # The first and the last answer have gaps of their own, so for three answers or fewer nothing would be saved.
        gaps = conversation.gaps() if len(chosen) > 3 else {}
        # Gaps -> how many characters of them belong to the answer between them, and what else ends it where it is last.
        known: dict[tuple[str, str], tuple[int, int, str]] = {}
        answers: list[Answer] = []
        searched: list[int] = []
        for k in chosen:
            is_plain = not self._turns[k].calls and not conversation.parts(k).closing
            start, end, gap = gaps[k] if k in gaps and is_plain else (0, 0, None)
            if gap in known:
                n_before, n_after, rest = known[gap]
                first = start - n_before
                last = end + n_after
                self._check(k, text[first:last])
            else:
                searched.append(k)
                self._limited(searched)
                context, completion = conversation.answer(k)
                self._check(k, completion)
                if not text.startswith(context):
                    return None
                first = len(context)
                last = first + n_common(completion, text[first:])
                rest = completion[last - first :]
                if gap and first <= start <= end <= last:
                    known[gap] = (start - first, last - end, rest)
            answer = self._answer(k, (ids, ends, plain), (self._unmarked(first), self._unmarked(last)), rest)
            if answer is None:
                return None
            answers.append(answer)
        return Context(ids, answers)

    def _unmarked(self, at: int) -> int:
        """A place in the marked text of the conversation as a place in the text without marks."""
        return at - self._conversation.text.count(self._sign, 0, at) if self._sign else at

    def _limited(self, searched: list[int]) -> list[int]:
        if len(searched) > _MOST_SEARCHED:
            raise RowsError(
                f"{self._where}: the chat template renders each of its {len(self._turns):,} turns in a different way, "
                f"and at most {_MOST_SEARCHED:,} such answers are allowed; split it into several rows"
            )
        return searched

    def _answer(
        self, k: int, whole: tuple[list[int], list[int], str], place: tuple[int, int], rest: str
    ) -> Answer | None:
        """The answer of turn `k` at a place in the whole conversation; None if its tokens there are not those that
        generation would meet and produce.

        Args:
            k: the turn.
            whole: the ids of the conversation, which may be extended by an end token, the ends of their characters, and
                the text.
            place: the first character of the completion, and the end of what the whole has of it.
            rest: what the completion has beyond that.
        """
        ids, ends, text = whole
        first = bisect_right(ends, place[0])
        last = bisect_right(ends, place[1])
        if not self._is_border(ids, ends, text, first, place[0]):
            return None
        end = self._end(ids[first:last], [at - place[0] for at in ends[first:last]], text[place[0] : place[1]] + rest)
        if end is None and (k + 1 < len(self._turns) or rest):
            return None
        if end is None:  # the template writes no end token, so add one
            ids[last:] = [self._tokenizer.eos_token_id]
            ends[last:] = [place[1]]
            end = last + 1 - first
        relative = [at - place[0] for at in ends[first : first + end]]
        return self._spans(k, first, ids[first : first + end], relative, text[place[0] : place[1]])

    def _is_border(self, ids: list[int], ends: list[int], text: str, first: int, at: int) -> bool:
        """Whether the text before character `at` has the tokens `ids[:first]` even if nothing follows it."""
        if first == 0:
            return at == 0
        if ends[first - 1] != at:
            return False
        control = self._special.control
        begin = next((j for j in range(first - 1, max(first - _WINDOW, 0) - 1, -1) if ids[j] in control), None)
        begin_at = max(ends[begin] if begin is not None else 0, at - _WINDOW)
        window = _last_ids(self._tokenizer, text[begin_at:at])
        return window == tuple(ids[first - len(window) : first])

    def _end(self, ids: list[int], ends: list[int], completion: str) -> int | None:
        """The number of tokens up to and including the one that ends a turn; None if none of them does.

        The turn ends with its last control token; line breaks that a template adds after it are not learned.
        """
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self._special.stops), None)
        if last is None:
            return None
        behind = completion[ends[last] :]
        pattern = self._special.pattern
        return last + 1 if not (pattern.sub("", behind) if pattern else behind).strip() else None

    def _alone(self, k: int) -> Context:
        """Answer `k` behind its own context."""
        context, completion = self._conversation.answer(k)
        self._check(k, completion)
        ids = prompt_ids(context, self._sign, self._tokenizer)
        whole, ends = _tokenize(context + completion, self._sign, self._tokenizer)
        plain, _as_text = unmark(completion, self._sign)
        n_before = len(unmark(context, self._sign)[0])
        if whole[: len(ids)] == ids:
            learned = whole[len(ids) :]
            ends = [at - n_before for at in ends[len(ids) :]]
        else:
            learned, ends = tokenize_behind(*unmark(completion, self._sign), self._tokenizer)
        end = self._end(learned, ends, plain)
        if end is None:
            learned = [*learned, self._tokenizer.eos_token_id]
            ends = [*ends, len(plain)]
            end = len(learned)
        answer = self._spans(k, len(ids), learned[:end], ends[:end], plain)
        return Context([*ids, *learned[:end]], [answer])

    def _spans(self, k: int, first: int, ids: list[int], ends: list[int], completion: str) -> Answer:
        """An answer whose tokens begin at index `first` of its context and end with an end token."""
        parts = Parts(*(unmark(text, self._sign)[0] for text in self._conversation.parts(k)))
        spans = spans_of(completion, ends, parts, calls_of(self._turns[k]))
        is_empty = not parts.words.strip() and not self._turns[k].calls
        return Answer(first, first + len(ids), True, is_empty, [(a + first, b + first, kind) for a, b, kind in spans])

    def _check(self, k: int, text: str) -> None:
        """Check that all that turn `k` says is in `text`.

        Raises:
            RowsError: the template leaves it out; the message names what.
        """
        what = self._conversation.lost(k, text)
        if what:
            raise self._conversation.refusal(k, what)

    def _check_rest(self, chosen: Sequence[int]) -> None:
        """Check that all that the turns say which are not learned is in the conversation or in a context of an answer;
        of answers, the template may write the reasoning and words only as long as they are the newest."""
        conversation = self._conversation
        for k in sorted({*range(len(self._turns))} - {*chosen}):
            what = conversation.lost(k, conversation.text)
            if what and self._turns[k].role == "assistant":
                self._check(k, conversation.answer(k)[1])
            elif what and not any(conversation.lost(k, conversation.answer(n)[0]) is None for n in chosen if n > k):
                raise conversation.refusal(k, what)


def _chosen(answer: Answer, loss_on: str, reasoning: str) -> Answer:
    """The answer with those of its spans that the settings choose."""
    kinds = {kind for _first, _end, kind in answer.spans}
    left_out = {"reasoning"} if reasoning == "mask" or loss_on == "tool_calls" else set()
    if loss_on == "tool_calls":
        left_out |= {"answer"}
    elif loss_on == "content":
        left_out |= {"call", "end"} if "call" in kinds else set()
    spans = [span for span in answer.spans if span[2] not in left_out]
    return replace(answer, spans=spans, has_stop=answer.has_stop and "end" not in left_out)


@lru_cache(maxsize=4096)  # nearly all answers follow the same header
def _last_ids(tokenizer: Any, window: str) -> tuple[int, ...]:
    """The last two ids of a text's tokens, or fewer: its first token depends on what precedes it."""
    return tuple(tokenize(window, tokenizer)[0][1:][-2:])
