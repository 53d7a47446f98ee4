"""Text to tokens, where text that merely spells a control token stays text.

A user may write `</s>` or `<|im_end|>` in a message. A tokenizer would make the control token of it, and the model
would learn, or be told, that a turn ends there. So contents are marked before a template renders them (`mark`), and
what is found behind a mark is tokenized as the characters that it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

MARKS = range(0xF0000, 0xFFFFE)  # private use: templates pass them through, and nobody trims them


def control_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that steer rather than say something."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}


def stop_ids(tokenizer: Any) -> set[int]:
    """Control tokens that may end a turn."""
    fillers = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    return control_ids(tokenizer) - fillers


def spelled(text: str, tokenizer: Any) -> list[int]:
    """Where control tokens are spelled out in `text`."""
    literals = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    if not any(literal in text for literal in literals):
        return []
    pattern = "|".join(re.escape(literal) for literal in reversed(literals))
    return [match.start() for match in re.finditer(pattern, text)]


def mark(contents: Sequence[str], tokenizer: Any) -> tuple[list[str], str]:
    """The contents with a mark before every control token that they spell, and the mark; "" where none is."""
    found = [spelled(content, tokenizer) for content in contents]
    if not any(found):
        return list(contents), ""
    whole = "".join(contents)
    sign = next(chr(code) for code in MARKS if chr(code) not in whole)
    marked = []
    for content, places in zip(contents, found, strict=True):
        borders = [0, *places, len(content)]
        marked.append(sign.join(content[a:b] for a, b in pairwise(borders)))
    return marked, sign


def unmark(text: str, sign: str) -> tuple[str, list[int]]:
    """The text without its marks, and where they stood."""
    if not sign:
        return text, []
    places, seen = [], 0
    for part in text.split(sign)[:-1]:
        seen += len(part)
        places.append(seen)
    return text.replace(sign, ""), places


def tokenize(text: str, tokenizer: Any, as_text: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """Ids, and for each token the character behind its last; control tokens spelled at `as_text` become characters.

    Only the stretches between true control tokens that hold such a spelling are tokenized anew, so all others keep the
    tokens that they always have.
    """
    ids, spans = _tokenize(text, tokenizer)
    if not as_text:
        return ids, [end for _start, end in spans]
    control = control_ids(tokenizer)
    true = [i for i, (a, b) in enumerate(spans) if ids[i] in control and not any(a <= place < b for place in as_text)]
    done: tuple[list[int], list[int]] = ([], [])
    for before, behind in zip([-1, *true], [*true, len(ids)], strict=True):
        first = spans[before][1] if before >= 0 else 0
        last = spans[behind][0] if behind < len(ids) else len(text)
        if any(first <= place < last for place in as_text):
            lead = tokenizer.decode([ids[before]]) if before >= 0 else ""
            inner, ends = _tokenize_as_text(text[first:last], tokenizer, lead)
            ends = [first + end for end in ends]
        else:
            inner, ends = ids[before + 1 : behind], [end for _start, end in spans[before + 1 : behind]]
        done[0].extend(inner)
        done[1].extend(ends)
        if behind < len(ids):
            done[0].append(ids[behind])
            done[1].append(spans[behind][1])
    return done


def _tokenize_as_text(text: str, tokenizer: Any, lead: str) -> tuple[list[int], list[int]]:
    """Ids and ends of text without any control token, as they are behind the control token `lead`."""
    probe = _tokenize(lead + "a", tokenizer)[0]
    if lead and probe[1:] != _tokenize("a", tokenizer)[0]:
        # This tokenizer puts a space before a text's beginning, and here is none: a line break takes it instead.
        shield = _tokenize("\n", tokenizer, split_special_tokens=True)[0]
        ids, spans = _tokenize("\n" + text, tokenizer, split_special_tokens=True)
        if ids[: len(shield)] == shield:
            return ids[len(shield) :], [end - 1 for _start, end in spans[len(shield) :]]
    ids, spans = _tokenize(text, tokenizer, split_special_tokens=True)
    return ids, [end for _start, end in spans]


def _tokenize(text: str, tokenizer: Any, **options: bool) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its begin token first when asked for nothing special."""
    return bool(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)
