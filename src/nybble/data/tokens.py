"""Tokenize text so that text which merely spells a control token stays text.

A user may write `</s>` or `<|im_end|>` in a message. A tokenizer would turn that into the control token, and the model
would see a turn end there. So contents are marked before a template renders them (`mark`), and the text after a mark is
tokenized as plain characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

IGNORED = -100  # the label that torch's cross-entropy skips
MARKS = range(0xF0000, 0xFFFFE)  # private-use characters: templates pass them through and never trim them


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer."""

    control: frozenset[int]  # ids of all of them
    stops: frozenset[int]  # ids of those that may end a turn
    pattern: re.Pattern[str] | None  # matches the text of any of them; None if there are none

    def spelled(self, text: str) -> list[int]:
        """The positions in `text`, in characters, where a control token is spelled out."""
        return [match.start() for match in self.pattern.finditer(text)] if self.pattern else []


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The special tokens of a tokenizer."""
    return _special(tokenizer, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)


@lru_cache(maxsize=8)  # reading a tokenizer's added tokens can take longer than tokenizing a row
def _special(tokenizer: Any, _size: int, eos: int, pad: int | None) -> SpecialTokens:
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    longest_first = sorted(special.values(), key=len, reverse=True)
    control = frozenset({*special, eos})
    return SpecialTokens(
        control=control,
        stops=control - ({tokenizer.unk_token_id, pad} - {eos}),
        pattern=re.compile("|".join(map(re.escape, longest_first))) if longest_first else None,
    )


def mark(contents: Sequence[str], tokenizer: Any) -> tuple[list[str], str]:
    """The contents with a mark before each control token that they spell, and that mark ("" if none is needed)."""
    special = special_tokens(tokenizer)
    spelled_at = [special.spelled(content) for content in contents]
    if not any(spelled_at):
        return list(contents), ""
    whole = "".join(contents)
    sign = next(chr(code) for code in MARKS if chr(code) not in whole)
    marked = []
    for content, places in zip(contents, spelled_at, strict=True):
        borders = [0, *places, len(content)]
        marked.append(sign.join(content[a:b] for a, b in pairwise(borders)))
    return marked, sign


def unmark(text: str, sign: str) -> tuple[str, list[int]]:
    """The text without its marks, and the positions in it where they were."""
    if not sign:
        return text, []
    places = []
    seen = 0
    for part in text.split(sign)[:-1]:
        seen += len(part)
        places.append(seen)
    return text.replace(sign, ""), places


def tokenize(text: str, tokenizer: Any, as_text: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """Token ids, and for each token the end of its characters; control tokens spelled at `as_text` stay text.

    Only stretches between real control tokens that contain such a spelling are tokenized a second time, so all other
    stretches keep their usual tokens.
    """
    ids, spans = _tokenize(text, tokenizer)
    if not as_text:
        return ids, [end for _start, end in spans]
    control = special_tokens(tokenizer).control
    real = [i for i, (a, b) in enumerate(spans) if ids[i] in control and not any(a <= place < b for place in as_text)]
    all_ids: list[int] = []
    all_ends: list[int] = []
    for before, after in zip([-1, *real], [*real, len(ids)], strict=True):
        first = spans[before][1] if before >= 0 else 0
        last = spans[after][0] if after < len(ids) else len(text)
        if any(first <= place < last for place in as_text):
            lead = tokenizer.decode([ids[before]]) if before >= 0 else ""
            inner, ends = _tokenize_as_text(text[first:last], tokenizer, lead)
            ends = [first + end for end in ends]
        else:
            inner = ids[before + 1 : after]
            ends = [end for _start, end in spans[before + 1 : after]]
        all_ids.extend(inner)
        all_ends.extend(ends)
        if after < len(ids):
            all_ids.append(ids[after])
            all_ends.append(spans[after][1])
    return all_ids, all_ends


def tokenize_behind(text: str, as_text: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Like `tokenize`, for text that continues another one: it is tokenized behind a control token."""
    lead = tokenizer.eos_token
    ids, ends = tokenize(lead + text, tokenizer, [len(lead) + place for place in as_text])
    return ids[1:], [end - len(lead) for end in ends[1:]]


def _tokenize_as_text(text: str, tokenizer: Any, lead: str) -> tuple[list[int], list[int]]:
    """Ids and ends of text that contains no control token and follows the control token `lead`."""
    probe = _tokenize(lead + "a", tokenizer)[0]
    if lead and probe[1:] != _tokenize("a", tokenizer)[0]:
        # This tokenizer prepends a space to a text, which is wrong here: a line break takes it and is removed again.
        shield = _tokenize("\n", tokenizer, split_special_tokens=True)[0]
        ids, spans = _tokenize("\n" + text, tokenizer, split_special_tokens=True)
        if ids[: len(shield)] == shield:
            return ids[len(shield) :], [end - 1 for _start, end in spans[len(shield) :]]
    ids, spans = _tokenize(text, tokenizer, split_special_tokens=True)
    return ids, [end for _start, end in spans]


def _tokenize(text: str, tokenizer: Any, **options: bool) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    spans = list(encoded["offset_mapping"])
    if len(spans) > 1 and spans[0] == (0, 0):  # a tokenizer may trim white space, and then the first token has none
        spans[0] = (0, spans[1][0])
    return list(encoded["input_ids"]), spans


@lru_cache(maxsize=8)
def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer prepends its begin token by default."""
    return bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)
