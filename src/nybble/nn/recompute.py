"""Recomputation of decoder layers by torch's own checkpointing; a layer can ask whether it is being recomputed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

from nybble.nn.rows import Rows, computing, current_rows


class _State(threading.local):
    active = False


_state = _State()


def recomputing() -> bool:
    """Whether this thread is computing a layer's activations for the second time, in the backward pass."""
    return _state.active


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of which only the arguments are kept; the rest is computed again in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _second_time(current_rows())


@contextmanager
def _second_time(rows: Rows | None) -> Iterator[None]:
    _state.active = True
    try:
        with computing(rows):
            yield
    finally:
        _state.active = False
