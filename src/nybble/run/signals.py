"""Signals that ask a process to save and end: Ctrl+C, a scheduler's SIGTERM, and SIGHUP of a terminal that closes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none

Handler = Callable[[int, Any], None]


def handle_stop_signals(handler: Handler) -> dict[signal.Signals, Any]:
    """Have `handler` called for each of them; returns the handlers that were there before, for `signal.signal`.

    A SIGHUP that is ignored stays ignored: `nohup` asks for that. Outside the main thread nothing is changed, since
    the program around it owns the signals.
    """
    former: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, HANG_UP):
        if number is None or (number == HANG_UP and signal.getsignal(number) is signal.SIG_IGN):
            continue
        try:
            former[number] = signal.signal(number, handler)
        except ValueError:  # not in the main thread
            break
    return former


def ignore_further_hang_ups() -> None:
    """From now on SIGHUP does nothing: a terminal that closes sends it twice, by its shell and by the kernel."""
    if HANG_UP is not None:
        signal.signal(HANG_UP, signal.SIG_IGN)
