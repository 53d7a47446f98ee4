"""What people see of a call while it goes on, from the command line, a script or a notebook.

On a terminal and in a notebook there is a bar; elsewhere there are lines. All of it goes to stderr, in a notebook to
the output of the cell. A program that has set up `logging` so that INFO records of the logger "nybble" go somewhere
gets the lines as such records, and nothing is drawn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from html import escape
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from nybble.guard import redact, visible
from nybble.run.quiet import quiet_libraries
from nybble.run.record import Observer, Silent, StepEvent
from nybble.units import format_bytes, format_number, format_seconds

# What a call takes as its observer: one of the caller's own, the one that suits where the call was made, or none.
ObserverChoice = Observer | Literal["auto"] | None

logger = logging.getLogger("nybble")

_SECONDS_BETWEEN_LINES = 10  # about work other than training, where there is no bar
_WIDTH_WITH_BAR = 50  # columns; narrower terminals show the figures alone
_WIDTH_WITH_ELAPSED = 100
_NARROWEST_BAR = 8
_STAGES = {
    "rows": "reading rows",
    "plan": "planning",
    "load": "loading the base",
    "evaluate base": "evaluating the base",
    "probe": "probing learning rates",
    "precompute": "computing the reference's log-probabilities",
    "train": "training",
    "evaluate": "evaluating the tuned model",
    "save": "saving",
    "report": "writing the report",
    "reference": "asking the adapter on its base",
    "pack": "encoding in 4 bits",
    "gguf": "writing GGUF",
    "verify": "reading back in stock transformers",
    "importance": "gathering the importance matrix",
    "measure": "measuring the files on the rows",
    "server": "asking the server",
    "upload": "uploading",
}


@contextmanager
def watching(observer: ObserverChoice) -> Iterator[Observer]:
    """The observer of a call, and libraries that are quiet during it.

    Args:
        observer: one of the caller's own; "auto" for what the module's docstring describes; None for silence.
    """
    with quiet_libraries():
        if observer is None:
            yield Silent()
        elif observer != "auto":
            yield observer
        else:
            with closing(_suitable()) as suitable:
                yield suitable


def _suitable() -> Lines:
    """The observer for where this process runs."""
    if logger.level > logging.INFO:  # the caller's wish about this very logger
        return Lines(lambda text, is_heading: None)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        return Lines(lambda text, is_heading: logger.info("%s", text))
    console = Console(stderr=True, highlight=False)
    if console.is_jupyter:
        return Bar(lambda text, is_heading: print(text if is_heading else f"  {text}"), _NotebookBar)  # noqa: T201
    printed = _printer(console)
    return Bar(printed, lambda total: _TerminalBar(console, total)) if console.is_terminal else Lines(printed)


def _printer(console: Console) -> Callable[[str, bool], None]:
    def say(text: str, is_heading: bool) -> None:
        if is_heading:
            console.print(text, style="bold", markup=False, soft_wrap=True)
        elif console.is_terminal:  # lines break between words there, and stay indented
            console.print(Padding.indent(Text(text), 2))
        else:
            console.print(f"  {text}", markup=False, soft_wrap=True)

    return say


class Lines:
    """An observer that says everything in lines."""

    def __init__(self, say: Callable[[str, bool], None]) -> None:
        """`say` takes a line and whether it is a heading."""
        self._say = say
        self._said = time.monotonic()  # when the latest line about other work was
        self._work: tuple[str, int, float] | None = None  # which, how far it was at first, and when

    def stage(self, name: str) -> None:
        """Announce a part of the run."""
        self._said = time.monotonic()
        self._say(visible(redact(_STAGES.get(name, name))), True)

    def note(self, text: str) -> None:
        """Say a remark."""
        self._say(visible(redact(text)), False)

    def progress(self, what: str, done: int, total: int) -> None:
        """Say now and then how far other work is."""
        now = time.monotonic()
        line = self._so_far(what, done, total, now)
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self.note(line)

    def _so_far(self, what: str, done: int, total: int, now: float) -> str:
        """How far work is, and how long the rest takes if it goes on as since it was first told."""
        if self._work is None or self._work[0] != what or done <= self._work[1]:
            self._work = (what, done, now)
        _what, first, since = self._work
        line = f"{what} {done:,}/{total:,}"
        if not first < done < total:
            return line
        return f"{line}  {format_seconds((now - since) / (done - first) * (total - done))} left"

    def step(self, event: StepEvent) -> None:
        """Say the figures of a step."""
        if event.eval_loss is not None:
            self.note(f"step {event.step}: held-out loss {event.eval_loss:.4f}")
        else:
            self.note("  ".join(_figures(event)))

    def close(self) -> None:
        """There is nothing to take down."""


class _Drawn(Protocol):
    """A bar that is drawn somewhere."""

    def update(self, done: int, figures: Sequence[str], order: Sequence[int]) -> None: ...

    def stop(self) -> None: ...


class Bar(Lines):
    """An observer that says stages and remarks in lines, and moves a bar."""

    def __init__(self, say: Callable[[str, bool], None], draw: Callable[[int], _Drawn]) -> None:
        """`draw` begins a bar of so many steps."""
        super().__init__(say)
        self._draw = draw
        self._bar: _Drawn | None = None
        self._total = 0  # of that bar

    def stage(self, name: str) -> None:
        """Announce a part of the run below the last bar."""
        self.close()
        super().stage(name)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar of other work."""
        self._move(done, total, (self._so_far(what, done, total, time.monotonic()),), (0,))
        if done == total:
            self.close()

    def step(self, event: StepEvent) -> None:
        """Move the bar of the training; held-out figures are lines."""
        if event.eval_loss is not None:
            super().step(event)
        else:
            self._move(event.step, event.total_steps, _figures(event), _MOST_WANTED)

    def _move(self, done: int, total: int, figures: Sequence[str], order: Sequence[int]) -> None:
        if self._bar is None or total != self._total:
            self.close()
            self._bar, self._total = self._draw(total), total
        self._bar.update(done, figures, order)

    def close(self) -> None:
        """Leave the bar as it is; the next one is drawn below."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _TerminalBar:
    """A bar on a terminal of any width."""

    def __init__(self, console: Console, total: int) -> None:
        columns: list[ProgressColumn] = [TextColumn("{task.fields[figures]}", markup=False)]
        if console.width >= _WIDTH_WITH_BAR:
            columns.insert(0, BarColumn(bar_width=None))
        self._room = -_NARROWEST_BAR - 1 if console.width >= _WIDTH_WITH_BAR else 0
        if console.width >= _WIDTH_WITH_ELAPSED:
            columns.append(TimeElapsedColumn())
            self._room -= len(" 0:00:00")
        self._console = console
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task("", total=total, figures="")
        self._progress.start()

    def update(self, done: int, figures: Sequence[str], order: Sequence[int]) -> None:
        """Draw the bar again, with those figures that have room."""
        shown = fitting(figures, order, self._console.width + self._room)
        self._progress.update(self._task, completed=done, figures=shown)

    def stop(self) -> None:
        """Leave the bar on the terminal."""
        self._progress.stop()


class _NotebookBar:
    """A bar in the output of a notebook's cell; IPython is there, since it runs the cell."""

    def __init__(self, total: int) -> None:
        from IPython.display import display

        self._total = total
        self._handle: Any = display(self._content(0, ""), raw=True, display_id=True)

    def update(self, done: int, figures: Sequence[str], order: Sequence[int]) -> None:
        """Draw the bar again; a cell has room for all figures."""
        self._handle.update(self._content(done, "  ".join(figures)), raw=True)

    def stop(self) -> None:
        """The cell keeps the bar."""

    def _content(self, done: int, figures: str) -> dict[str, str]:
        html = f'<progress value="{done}" max="{self._total}"></progress> {escape(figures)}'
        return {"text/plain": figures, "text/html": html}


def _figures(event: StepEvent) -> tuple[str, ...]:
    speed = event.tokens / event.seconds if event.seconds else 0.0
    left = event.seconds / event.step * (event.total_steps - event.step) if event.step else None
    return (
        f"step {event.step}/{event.total_steps}",
        f"loss {format_number(event.loss)}",
        f"{speed:,.0f} tokens/s",
        f"peak {format_bytes(event.peak_bytes)}",
        f"{format_seconds(left)} left",
    )


_MOST_WANTED = (1, 4, 0, 2, 3)  # of these figures


def fitting(figures: Sequence[str], order: Sequence[int], width: int) -> str:
    """As many of the figures as have room in `width` columns, the most wanted ones first; at least one.

    Args:
        figures: in the order in which they are shown.
        order: their numbers, the most wanted first.
        width: in columns.
    """
    kept = list(order)
    while len(kept) > 1 and len("  ".join(figures[i] for i in kept)) > width:
        kept.pop()
    return "  ".join(figures[i] for i in sorted(kept))
