"""Child interpreters: answers, limits, endings, and errors that cross as data."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from nybble.errors import CannotRunError, NybbleError, RowsError, error_class
from nybble.subprocesses import ERROR_FILE, Child, ChildError, report_error

ECHO = "import json, sys\nfor line in sys.stdin: print(json.dumps({'is': json.loads(line)}), flush=True)"


def test_requests_and_answers_are_json() -> None:
    with Child(["-c", ECHO]) as child:
        assert child.ask({"a": 1}, 60) == {"is": {"a": 1}}
        assert child.ask({"b": "ü"}, 60) == {"is": {"b": "ü"}}
        assert child.is_running


def test_a_child_that_hangs_is_killed() -> None:
    with Child(["-c", "import time; time.sleep(600)"]) as child:
        with pytest.raises(ChildError, match=r"it hung: no answer within 0\.2 s"):
            child.answer(0.2)
        assert child.wait().signal_name == "SIGKILL"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, sys; print('oh', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)", "signal SIGSEGV: oh"),
        ("raise SystemExit(7)", "it ended with code 7"),
    ],
)
def test_an_ending_without_an_answer_is_described(program: str, said: str) -> None:
    with Child(["-c", program]) as child, pytest.raises(ChildError, match=said):
        child.answer(60)


def test_the_result_is_the_last_object_on_stdout() -> None:
    with Child(["-c", 'print(\'{"a": 1}\\nsome text\\n{"b": 2}\\n[3]\')']) as child:
        ending = child.wait()
    assert (ending.code, ending.result, ending.error, ending.last_line) == (0, {"b": 2}, None, "")


def test_an_error_crosses_with_its_class() -> None:
    program = (
        "import sys; from nybble.errors import RowsError; from nybble.subprocesses import report_error\n"
        "report_error(RowsError('rows.jsonl:3: no\\n  text')); print('nybble: shown', file=sys.stderr); sys.exit(2)"
    )
    with Child(["-c", program]) as child:
        ending = child.wait()
    assert isinstance(ending.error, RowsError)
    assert (ending.code, ending.reason, ending.last_line) == (2, "rows.jsonl:3: no text", "nybble: shown")


def test_the_command_line_reports_its_errors(tmp_path: Path) -> None:
    with Child(["-m", "nybble", "report", str(tmp_path / "none")]) as child:
        ending = child.wait()
    assert type(ending.error).__name__ == "InputError"
    assert ending.stderr.strip() == f"nybble: {ending.error}"


def test_nobody_asked_for_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    report_error(NybbleError("nothing is written"))


def test_lines_come_while_it_runs_and_go_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of a run before\n")
    program = "import sys\nfor i in range(3): print('line', i, file=sys.stderr, flush=True)\nsys.stderr.write('end')"
    with Child(["-c", program], log=log) as child:
        assert list(child.lines()) == ["line 0", "line 1", "line 2", "end"]
        assert child.wait().stderr == "line 0\nline 1\nline 2\nend"
    assert log.read_text() == "of a run before\nline 0\nline 1\nline 2\nend"


def test_a_signal_ends_it_and_is_named() -> None:
    with Child(["-c", ECHO]) as child:
        child.send_signal(signal.SIGKILL)
        assert child.wait().reason == "killed by SIGKILL (out of memory?)"


def test_only_our_errors_have_a_class() -> None:
    assert error_class("CannotRunError") is CannotRunError
    assert error_class("KeyboardInterrupt") is NybbleError
    assert error_class("annotations") is NybbleError
