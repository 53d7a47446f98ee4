"""Libraries whose remarks are meant for whoever calls them: that is us, and not the people who use Nybble."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within: the progress bars and the advice of the libraries are hidden, unless the caller has asked for more.

    Afterwards everything is as it was.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate)\..*")
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in notebooks without ipywidgets
        for name in ("bitsandbytes", "transformers"):
            of_library = logging.getLogger(name)
            if of_library.level in (logging.NOTSET, logging.WARNING):
                stack.callback(of_library.setLevel, of_library.level)
                of_library.setLevel(logging.ERROR)
        if "transformers" in sys.modules:
            from transformers.utils import logging as bars

            if bars.is_progress_bar_enabled():
                stack.callback(bars.enable_progress_bar)
                bars.disable_progress_bar()
        yield
