"""What a call shows on the way: lines, a bar, records of `logging`, or nothing; and libraries that are quiet."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import nybble
from nybble.run import progress
from nybble.run.progress import Lines, fitting, watching
from nybble.run.quiet import quiet_libraries
from nybble.run.record import Silent, StepEvent

LOGGER = logging.getLogger("nybble")
BARE = [
    line + "\n"
    for line in ("training", "  a remark", "  step 20/100  loss 1.5000  25 tokens/s  peak 4.20 GB  16.0 s left")
]


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    yield
    LOGGER.setLevel(logging.NOTSET)


def event(step: int = 20, **changes: Any) -> StepEvent:
    values = {
        "loss": 1.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100,
        "seconds": 4.0,
        "peak_bytes": 42 * 10**8,
    }
    return StepEvent(step=step, total_steps=100, **values | changes)


def say_all(observer: Any = "auto") -> None:
    with watching(observer) as watch:
        watch.stage("train")
        watch.note("a remark")
        watch.progress("merging", 1, 8)  # too early for a line
        watch.step(event())


def test_every_public_call_that_takes_long_shows_its_progress() -> None:
    calls = {name: getattr(nybble, name) for name in nybble.__all__}
    signatures = {name: inspect.signature(call) for name, call in calls.items() if inspect.isfunction(call)}
    observers = {name: s.parameters["observer"].default for name, s in signatures.items() if "observer" in s.parameters}
    listed = "compare demo doctor export inspect_rows merge probe quantize resume_check train"
    assert observers == dict.fromkeys(listed.split(), "auto")


def test_lines_go_to_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_all()
    captured = capsys.readouterr()
    assert captured.err.splitlines(keepends=True) == BARE
    assert captured.out == ""


def test_none_shows_nothing_and_another_observer_is_told_all(capsys: pytest.CaptureFixture[str]) -> None:
    say_all(None)
    told: list[Any] = []

    class Own(Silent):
        def step(self, event: StepEvent) -> None:
            told.append(event)

    say_all(Own())
    assert told == [event()]
    assert capsys.readouterr() == ("", "")


def test_a_program_that_logs_gets_records(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, logger="nybble")
    say_all()
    assert [record.message for record in caplog.records] == [line.strip() for line in BARE]
    assert {record.name for record in caplog.records} == {"nybble"}
    assert capsys.readouterr().err == ""


def test_a_level_above_info_is_a_wish_for_silence(capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.setLevel(logging.WARNING)
    say_all()
    assert capsys.readouterr() == ("", "")


def test_other_work_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    lines = Lines(lambda text, is_heading: said.append(text))
    for done in range(1, 9):
        lines.progress("merging", done, 8)
    assert said == ["merging 2/8  36.0 s left", "merging 4/8  24.0 s left", "merging 6/8  12.0 s left", "merging 8/8"]
    lines.progress("calibrating", 0, 2)
    lines.progress("calibrating", 1, 2)
    assert said[4:] == ["calibrating 1/2  6.0 s left"]


FIGURES = ("step 1000/20000", "loss 2.3456", "123,456 tokens/s", "peak 12.34 GB", "12 min left")
ORDER = (1, 4, 0, 2, 3)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, (0, 1, 2, 3, 4)),
        (60, (0, 1, 2, 4)),
        (45, (0, 1, 4)),
        (40, (1, 4)),
        (20, (1,)),
        (3, (1,)),
    ],
)
def test_narrow_terminals_keep_loss_and_time_left(width: int, shown: tuple[int, ...]) -> None:
    text = fitting(FIGURES, ORDER, width)
    assert text == "  ".join(FIGURES[i] for i in shown)
    assert len(text) <= width or len(shown) == 1


def test_lines_on_a_terminal_break_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "20")
    with watching("auto") as watch:
        watch.note("four rows are [red]cut and none is dropped")
    shown = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert shown == ["  four rows are", "  [red]cut and none", "  is dropped"]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_bar_on_a_terminal_has_loss_and_time_left_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    say_all()
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()
    drawn = [line for line in last if "step 20/100" in line][-1].partition("\x1b[?25h")[0]
    assert "loss 1.5000" in drawn
    assert "16.0 s left" in drawn
    assert "…" not in drawn
    assert ("━" in drawn) == (columns >= 50)
    assert ("peak" in drawn) == (columns >= 80)
    assert len(drawn.split("\x1b[2K")[-1]) <= columns


def test_a_notebook_has_a_bar_in_its_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[dict[str, str]] = []

    def display(content: dict[str, str], **options: Any) -> Any:
        shown.append(content)
        return SimpleNamespace(update=lambda content, raw: shown.append(content))

    class ZMQInteractiveShell:
        """By this name rich knows a notebook."""

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    say_all()
    assert capsys.readouterr().out.splitlines() == ["training", "  a remark"]
    assert '<progress value="20" max="100"></progress> step 20/100  loss 1.5000' in shown[-1]["text/html"]
    assert shown[-1]["text/plain"] == BARE[-1].strip()


def test_libraries_are_quiet_during_a_call_and_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as of_transformers

    bnb = logging.getLogger("bitsandbytes")
    of_transformers.enable_progress_bar()
    of_transformers.set_verbosity_warning()
    before = (list(warnings.filters), bnb.level)
    try:
        with quiet_libraries():
            warnings.warn("old name", FutureWarning, stacklevel=1)  # an error otherwise, in tests
            bnb.warning("pip install kernels")
            of_transformers.get_logger("transformers.x").warning("advice")
            assert not of_transformers.is_progress_bar_enabled()
        assert capsys.readouterr() == ("", "")
        assert of_transformers.is_progress_bar_enabled()
        assert of_transformers.get_verbosity() == logging.WARNING
        assert (list(warnings.filters), bnb.level) == before
        bnb.setLevel(logging.DEBUG)
        with quiet_libraries():
            assert bnb.level == logging.DEBUG, "who has asked for more gets it"
    finally:
        bnb.setLevel(before[1])
        of_transformers.disable_progress_bar()
