"""Show rows to people: tokens as text, in stretches that are learned or masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from nybble.data.encode import Example
from nybble.data.kinds import KINDS, Span
from nybble.data.prepare import Prepared
from nybble.data.tokens import IGNORED, special_tokens
from nybble.data.tree import Segments, unfold


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens that are all masked or all of one kind; each control token is a stretch by itself."""

    text: str
    is_learned: bool
    is_control: bool
    kind: str = ""  # of learned tokens: one of `kinds.KINDS`
    is_rejected: bool = False  # of learned tokens: of an answer that is rejected, or that is rated as bad


@dataclass(frozen=True)
class ShownRow:
    """One example with its counts and its text."""

    row: int  # row number, from 1; the parts of a split row have the same number
    use: str  # "train", "held_out" or "dropped"
    tokens: int
    trained: int
    stops: int  # end-of-turn tokens learned
    truncated: bool
    input_ids: list[int]
    spans: tuple[Span, ...]  # the learned tokens: first, end, kind
    segments: Segments  # of a row whose answers have contexts of their own: (number of tokens, parent or -1)
    parts: list[Stretch]
    is_pair: bool = False  # its segments are a prompt, the chosen answer and the rejected one
    is_desirable: bool | None = None  # whether a rated answer is good

    @property
    def title(self) -> str:
        """The counts of the row in one line."""
        use = {"held_out": ", held out", "dropped": ", dropped"}.get(self.use, "")
        ends = "1 end token" if self.stops == 1 else f"{self.stops} end tokens"
        cut = ", cut at max_length" if self.truncated else ""
        rated = "" if self.is_desirable is None else ", a good answer" if self.is_desirable else ", a bad answer"
        return f"row {self.row}{use}{rated}: {self.trained:,} of {self.tokens:,} tokens learned, {ends}{cut}"


def show_rows(prepared: Prepared, tokenizer: Any, n_rows: int, find: str = "") -> list[ShownRow]:
    """The first `n_rows` examples, in row order, whose text after encoding contains `find`."""
    shown: list[ShownRow] = []
    control = special_tokens(tokenizer).control
    for use, example in _in_order(prepared):
        if len(shown) >= n_rows:
            break
        if not find or find in _decode(example.input_ids, tokenizer):
            shown.append(_shown(use, example, tokenizer, control))
    return shown


def _in_order(prepared: Prepared) -> Iterator[tuple[str, Example]]:
    uses = [("train", prepared.train), ("dropped", prepared.dropped)]
    held_out = ("held_out", prepared.held_out)
    # Held-out rows of a separate file come after the rows of the training file.
    for group in [uses, [held_out]] if "+" in prepared.fingerprint else [[*uses, held_out]]:
        owners = np.concatenate([np.full(len(examples), k) for k, (_use, examples) in enumerate(group)])
        places = np.concatenate([np.arange(len(examples)) for _use, examples in group])
        rows = np.concatenate([examples.column("row") for _use, examples in group])
        for at in np.argsort(rows, kind="stable"):
            use, examples = group[owners[at]]
            yield use, examples[int(places[at])]


def _shown(use: str, example: Example, tokenizer: Any, control: frozenset[int]) -> ShownRow:
    return ShownRow(
        row=example.row,
        use=use,
        tokens=len(example.input_ids),
        trained=example.n_trained,
        stops=example.n_stops,
        truncated=example.is_truncated,
        input_ids=example.input_ids,
        spans=example.spans,
        segments=example.segments,
        parts=list(_parts(example, tokenizer, control)),
        is_pair=example.is_pair,
        is_desirable=example.is_desirable,
    )


def _parts(example: Example, tokenizer: Any, control: frozenset[int]) -> Iterator[Stretch]:
    """The stretches of an example; of a tree, those of each context, in which only its own answers are learned."""
    kinds = [""] * len(example.input_ids)
    for first, end, kind in example.spans:
        kinds[first:end] = [kind] * (end - first)
    if not example.segments:
        is_rejected = example.is_desirable is False
        for part in _stretches(example.input_ids, kinds, tokenizer, control):
            yield replace(part, is_rejected=is_rejected and part.is_learned)
        return
    if example.is_pair:
        yield from _sides(example, kinds, tokenizer, control)
        return
    codes = [IGNORED if not kind else KINDS.index(kind) for kind in kinds]
    rows = unfold(example.input_ids, codes, example.segments)
    for number, (ids, row_codes) in enumerate(rows, start=1):
        yield Stretch(f"{chr(10) if number > 1 else ''}context {number} of {len(rows)}:", False, is_control=True)
        yield Stretch("\n", False, is_control=False)
        row_kinds = ["" if code == IGNORED else KINDS[code] for code in row_codes]
        yield from _stretches(ids, row_kinds, tokenizer, control)


def _sides(example: Example, kinds: Sequence[str], tokenizer: Any, control: frozenset[int]) -> Iterator[Stretch]:
    """The stretches of a pair: those of the prompt, and of each answer behind it."""
    n_prompt, n_chosen = (length for length, _parent in example.segments[:2])
    chosen = range(n_prompt, n_prompt + n_chosen)
    rejected = range(chosen.stop, len(example.input_ids))
    for name, places in (("prompt", range(0)), ("chosen", chosen), ("rejected", rejected)):
        yield Stretch(f"{chr(10) if name != 'prompt' else ''}{name}:", False, is_control=True)
        yield Stretch("\n", False, is_control=False)
        context = [*range(n_prompt), *places]
        ids = [example.input_ids[place] for place in context]
        own = [kinds[place] for place in context]
        first = n_prompt if places else 0
        for part in _stretches(ids, own, tokenizer, control, first):
            yield replace(part, is_rejected=name == "rejected" and part.is_learned)


def _stretches(
    token_ids: Sequence[int], kinds: Sequence[str], tokenizer: Any, control: frozenset[int], first: int = 0
) -> Iterator[Stretch]:
    """The stretches of the tokens from `first` on; those before it are only their context."""
    marked = [
        # The position makes each control token a group by itself.
        ((kind, place if token in control else -1, place >= first), token)
        for place, (token, kind) in enumerate(zip(token_ids, kinds, strict=True))
    ]
    ids: list[int] = []
    before = ""
    for (kind, place, is_shown), group in groupby(marked, key=lambda entry: entry[0]):
        group_ids = [token for _, token in group]
        ids += group_ids
        # A decoder may drop a leading space, so the text of a stretch is what it adds to the text before it.
        whole = _decode(ids, tokenizer)
        text = whole[len(before) :] if whole.startswith(before) else _decode(group_ids, tokenizer)
        if is_shown:
            yield Stretch(text, bool(kind), place >= 0, kind)
        before = whole


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
