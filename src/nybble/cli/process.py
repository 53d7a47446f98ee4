"""What the command line sets for its own process; a program that uses the library is left as it is."""

from __future__ import annotations

import ctypes
import os
import sys

from nybble.run.signals import HANG_UP, handle_stop_signals, ignore_further_hang_ups

_MMAP_THRESHOLD = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # the number of this option in glibc's malloc.h


def own_process() -> None:
    """Before torch is imported: threads that wait for others sleep, and freed tensors go back to the system.

    By default threads spin and take the cores from those that work: torch's products and our own loops take turns on
    the same cores, and other programs may be there (two threads beside other work were 5 to 8 times slower than one).

    By default glibc learns to keep freed blocks of up to 32 MB in its heap, whose holes the next step's tensors of
    other sizes do not fit: a step of 168M parameters held 1.86 GB where 0.96 GB were in use. With a fixed threshold
    each block above it is a mapping of its own. The pages that the system must clear again cost about 5 % more
    processor time (docs/evidence/training-step.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # the user's choice, or that of the process which started this one
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_MMAP_THRESHOLD)  # for processes that this one starts
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def stop_as_by_ctrl_c() -> None:
    """SIGTERM and SIGHUP end what is under way as SIGINT does; training handles all three itself."""
    owner = os.getpid()

    def stop(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a child that was forked since
            os._exit(128 + number)
        if number == HANG_UP:
            ignore_further_hang_ups()
        raise KeyboardInterrupt

    handle_stop_signals(stop)


def import_libraries() -> None:
    """Import the libraries, after the variables that torch reads when it is imported are corrected.

    It takes seconds, so a verb reads its recipe and its options before.
    """
    from nybble.diagnostics import prepare

    for said in prepare():
        print(f"nybble: {said}", file=sys.stderr)
    import transformers  # noqa: F401
