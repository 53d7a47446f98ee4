"""Compared or rated answers as supervised rows, for what looks at one answer: losses, samples, merged models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nybble.data.encode import Example
from nybble.data.store import Examples


def supervised(examples: Examples) -> Sequence[Example]:
    """Pairs without the rejected answer, and of rated answers the good ones (all, if there is none); others stay."""
    if not len(examples):
        return examples
    if examples.column("is_pair").any():
        return _Chosen(examples)
    is_rated = ~examples.is_null("is_desirable")
    if not is_rated.any():
        return examples
    is_good = examples.column("is_desirable") == True  # noqa: E712 - an array
    return examples.take(is_good) if is_good.any() else examples


class _Chosen(Sequence[Example]):
    """The chosen answers of pairs, each built on access."""

    def __init__(self, pairs: Examples) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, at: Any) -> Any:
        return _Chosen(self._pairs[at]) if isinstance(at, slice) else _chosen(self._pairs[at])


def _chosen(example: Example) -> Example:
    if not example.segments:
        return example
    end = len(example.input_ids) - example.segments[2][0]
    spans = tuple(span for span in example.spans if span[1] <= end)
    return replace(
        example,
        input_ids=example.input_ids[:end],
        labels=example.labels[:end],
        segments=(),
        spans=spans,
        is_pair=False,
        n_answers=1,
        n_stops=sum(kind == "end" for _first, _end, kind in spans),
    )
