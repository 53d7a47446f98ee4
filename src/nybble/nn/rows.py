"""The rows of the flattened batch that is being computed, for layers that transformers does not hand them.

Attention and recurrent layers must know where rows end, and models of many families do not pass such an argument on. So
the model's forward sets it for the time it runs, in its own thread, and a recomputed layer sees what it saw before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """The rows of a flattened batch, or the segments of its trees."""

    lengths: tuple[int, ...]  # tokens of each, in order
    parents: tuple[int, ...] = ()  # the segment that each continues, or -1; empty: no trees
    # What must hold while a layer of the model runs, besides these being the rows; entered anew when it is recomputed.
    around: Callable[[], AbstractContextManager[None]] | None = None


class _State(threading.local):
    rows: Rows | None = None


_state = _State()


def current_rows() -> Rows | None:
    """The rows of the flattened batch that this thread computes now; None: rows are padded, or have a cache."""
    return _state.rows


@contextmanager
def computing(rows: Rows | None) -> Iterator[None]:
    """Within, `current_rows` returns `rows`."""
    before, _state.rows = _state.rows, rows
    try:
        if rows is None or rows.around is None:
            yield
        else:
            with rows.around():
                yield
    finally:
        _state.rows = before
