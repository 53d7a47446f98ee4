"""What people see while a run goes on: a live bar on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nybble.cli.terminal import visible
from nybble.guard import redact
from nybble.run.record import StepEvent
from nybble.units import format_bytes, format_number, format_seconds

_STAGES = {
    "rows": "reading rows",
    "plan": "planning",
    "load": "loading the base",
    "evaluate base": "evaluating the base",
    "probe": "probing learning rates",
    "train": "training",
    "evaluate": "evaluating the tuned model",
    "save": "saving",
    "report": "writing the report",
    "reference": "asking the adapter on its base",
    "pack": "encoding in 4 bits",
    "gguf": "writing GGUF",
    "verify": "reading back in stock transformers",
    "upload": "uploading",
}


class Live:
    """An observer that draws."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._eighth = 0  # of other work, that a line was printed for

    def stage(self, name: str) -> None:
        """Announce a part of the run."""
        self.close()
        self.console.print(visible(redact(_STAGES.get(name, name))), style="bold", markup=False)

    def note(self, text: str) -> None:
        """Print a remark."""
        self.console.print(f"  {visible(redact(text))}", markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar of other work, or print a line now and then."""
        figures = f"{what} {done:,}/{total:,}"
        eighth = 8 * done // total
        if self.console.is_terminal:
            self._draw(done, total, figures)
        elif eighth != self._eighth:
            self.note(figures)
        self._eighth = eighth % 8
        if done == total:
            self.close()

    def step(self, event: StepEvent) -> None:
        """Move the bar, or print a line."""
        if event.eval_loss is not None:
            self.note(f"step {event.step}: held-out loss {event.eval_loss:.4f}")
            return
        figures = _figures(event)
        if not self.console.is_terminal:
            self.note(figures)
            return
        self._draw(event.step, event.total_steps, figures)

    def _draw(self, done: int, total: int, figures: str) -> None:
        if self._bar is None:
            columns = (BarColumn(bar_width=None), TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console, expand=True)
            self._bar.start()
            self._bar.add_task("", total=total, figures=figures)
        self._bar.update(self._bar.task_ids[0], completed=done, figures=figures)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(event: StepEvent) -> str:
    speed = event.tokens / event.seconds if event.seconds else 0.0
    left = event.seconds / event.step * (event.total_steps - event.step) if event.step else None
    return (
        f"step {event.step}/{event.total_steps}  loss {format_number(event.loss)}  {speed:,.0f} tokens/s  "
        f"peak {format_bytes(event.peak_bytes)}  {format_seconds(left)} left"
    )
