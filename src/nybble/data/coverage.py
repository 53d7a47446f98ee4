"""Characters that a tokenizer has no token for: they would vanish from the rows, or become its unknown token.

White space and what does not print (control characters, joiners) are left out: tokenizers rewrite those on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nybble.data.shapes import Form, Piece, Turn


@dataclass(frozen=True)
class Lost:
    """What a tokenizer loses of one row."""

    characters: tuple[str, ...] = ()  # distinct ones, of the whole row
    n_answer: int = 0  # characters of the answers
    n_answer_lost: int = 0  # those of them that are lost


NOTHING_LOST = Lost()


def lost_in(form: Form, tokenizer: Any) -> Lost:
    """What the tokenizer loses of a row; only characters that it is not known to keep cost anything."""
    answers = [text for part in form for text in _answers(part)]
    n_answer = sum(map(len, answers))
    kept = _kept(tokenizer)
    unknown = set().union(*answers, *map(_whole, form)) - kept
    if not unknown:
        return Lost(n_answer=n_answer)
    shown = [character for character in unknown if _is_shown(character)]
    alone = set(_lost_alone(shown, tokenizer)) if shown else set()
    kept |= unknown - alone
    of_answers, of_others = (_lost_in_words(alone, texts, tokenizer) for texts in (answers, map(_whole, form)))
    return Lost(tuple(sorted({*of_answers, *of_others})), n_answer, of_answers.total())


def _answers(part: Piece | Turn) -> tuple[str, ...]:
    if isinstance(part, Piece):
        return (part.text[part.answer_start :],)
    return (part.reasoning, part.content, part.calls) if part.role == "assistant" else ()


def _whole(part: Piece | Turn) -> str:
    return part.text if isinstance(part, Piece) else part.content


def _is_shown(character: str) -> bool:
    return character.isprintable() and not character.isspace()


@lru_cache(maxsize=8)
def _kept(_tokenizer: Any) -> set[str]:
    """The characters that the tokenizer is known to keep, or that do not matter."""
    return set()


def _lost_alone(characters: list[str], tokenizer: Any) -> Iterator[str]:
    """Those that no token stands for alone."""
    ids = tokenizer(characters, add_special_tokens=False)["input_ids"]
    for character, own, text in zip(characters, ids, tokenizer.batch_decode(ids), strict=True):
        if tokenizer.unk_token_id in own or not text.strip():
            yield character


def _lost_in_words(alone: set[str], texts: Iterable[str], tokenizer: Any) -> Counter[str]:
    """How often each of the characters `alone` is lost: a tokenizer of words has tokens for words that hold them."""
    words = Counter(word for text in texts for word in text.split() if not alone.isdisjoint(word)) if alone else {}
    lost: Counter[str] = Counter()
    if words:
        ids = tokenizer(list(words), add_special_tokens=False)["input_ids"]
        for (word, n), own, kept in zip(words.items(), ids, tokenizer.batch_decode(ids), strict=True):
            for character in alone.intersection(word):
                if tokenizer.unk_token_id in own or character not in kept:
                    lost[character] += n * word.count(character)
    return lost
