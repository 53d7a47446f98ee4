"""Work that stands for several pieces of the same kind, while a step is traced on tensors without data.

A mixture of experts does the same for every expert. To trace one of them is enough for memory; whoever counts work asks
here how often what it sees is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _State(threading.local):
    times = 1


_state = _State()


def times() -> int:
    """How often the work that this thread is doing is done in a real step."""
    return _state.times


@contextmanager
def done(n: int) -> Iterator[None]:
    """Within, the work stands for `n` pieces like it."""
    before, _state.times = _state.times, n
    try:
        yield
    finally:
        _state.times = before
