"""What the command line sets for its own process; a program that uses the library is left as it is."""

from __future__ import annotations

import os
import signal
import sys


def own_process() -> None:
    """Before torch is imported: threads that wait for others sleep.

    By default they spin and take the cores from those that work: torch's products and our own loops take turns on the
    same cores, and other programs may be there (two threads beside other work were 5 to 8 times slower than one).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def stop_as_by_ctrl_c() -> None:
    """SIGTERM, as schedulers send it, ends what is under way as SIGINT does; training handles both itself."""
    owner = os.getpid()

    def stop(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a child that was forked since
            os._exit(128 + number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def quiet_libraries() -> None:
    """Import the libraries and silence their progress bars and advice: this process belongs to the command line.

    Variables that torch reads when it is imported are corrected first. Importing takes seconds, so a verb reads its
    recipe and its options before.
    """
    import logging
    import warnings

    from nybble.diagnostics import prepare

    for said in prepare():
        print(f"nybble: {said}", file=sys.stderr)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate)\..*")
