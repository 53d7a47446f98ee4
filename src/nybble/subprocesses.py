"""Work in a fresh Python interpreter: started, listened to, limited in time, and its ending described.

Between the two processes everything is JSON. The child prints its answers on stdout, one object a line; requests, where
there are any, reach it on stdin in the same way. Its stderr is for people and goes to a file. A `NybbleError` that the
child raises crosses as well: the child writes class and message into the file that `NYBBLE_ERROR_FILE` names (launchers
of torch do the same with `TORCHELASTIC_ERROR_FILE`), and nobody has to parse what was printed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from nybble.errors import NybbleError, error_class
from nybble.guard import redact

ERROR_FILE = "NYBBLE_ERROR_FILE"
_SECONDS_BETWEEN_LOOKS = 0.05
_MOST_STDERR_BYTES = 1 << 20  # of the end of stderr that is read to explain an ending


class ChildError(Exception):
    """A child process hung, or ended when an answer was expected; the message says which, for people."""


@dataclass(frozen=True)
class Ending:
    """How a child process ended."""

    code: int  # its exit code; negative: the number of the signal that killed it
    error: NybbleError | None  # what it raised on purpose
    stderr: str  # the end of what it printed for people
    result: dict[str, Any] | None  # the last JSON object that it printed and that was not read before

    @property
    def last_line(self) -> str:
        """The last line it printed for people; empty if there is none."""
        lines = self.stderr.strip().splitlines()
        return lines[-1].strip() if lines else ""

    @property
    def signal_name(self) -> str | None:
        """The name of the signal that killed it."""
        return signal.Signals(-self.code).name if self.code < 0 else None

    @property
    def reason(self) -> str:
        """Why it failed, for people."""
        if self.error is not None:
            return str(self.error)
        if self.signal_name:
            return f"killed by {self.signal_name}" + (" (out of memory?)" if self.code == -signal.SIGKILL else "")
        return self.last_line or f"ended with exit code {self.code}"


class Child:
    """A Python interpreter of its own. Use it as a context manager, which ends it."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        new_session: bool = False,
    ) -> None:
        """Start it.

        Args:
            arguments: those of the interpreter, such as `["-m", "nybble", "train", "recipe.yaml"]`.
            environment: variables that are set besides this process's own.
            log: the file to which its stderr is appended; without one, stderr is kept until `close`.
            new_session: whether Ctrl+C in a terminal reaches only this process, which can then pass it on.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="nybble-child-")
        self._error_file = Path(self._scratch.name) / "error.json"
        self._log = log or Path(self._scratch.name) / "stderr"
        with self._log.open("ab") as stderr:
            self._log_start = stderr.tell()
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **(environment or {}), ERROR_FILE: str(self._error_file)},
                start_new_session=new_session,
            )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)
        self._lines: queue.Queue[str | None] = queue.Queue()  # None: stdout was closed
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], limit_seconds: float | None = None) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            ChildError: there is no answer within the limit (the process is then killed), or the process ended.
        """
        try:
            self._requests.write(f"{json.dumps(request)}\n")
            self._requests.flush()
        except OSError:
            raise ChildError(self._ended()) from None
        return self.answer(limit_seconds)

    def answer(self, limit_seconds: float | None = None) -> dict[str, Any]:
        """The next answer.

        Raises:
            ChildError: as `ask`.
        """
        try:
            line = self._lines.get(timeout=limit_seconds)
        except queue.Empty:
            self._process.kill()
            raise ChildError(f"it hung: no answer within {limit_seconds:g} s") from None
        if line is None:
            raise ChildError(self._ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def lines(self) -> Iterator[str]:
        """The lines of its stderr while it runs, each as soon as it is complete; ends when the process has ended."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            rest = b""
            has_ended = False
            while not has_ended:
                has_ended = not self.is_running  # asked before reading, so that the last lines are not missed
                *complete, rest = (rest + file.read()).split(b"\n")
                if has_ended and rest:
                    complete.append(rest)
                for line in complete:
                    yield line.decode(errors="replace")
                if not has_ended:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        self._process.send_signal(number)

    def wait(self) -> Ending:
        """Wait until it ends."""
        code = self._process.wait()
        self._listener.join()
        return Ending(code=code, error=self._error(), stderr=self._stderr(), result=self._last_answer())

    def close(self) -> None:
        """Kill it if it runs, and free everything."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._requests, self._answers):
            _close(pipe)
        self._scratch.cleanup()

    def _listen(self) -> None:
        for line in self._answers:
            self._lines.put(line)
        self._lines.put(None)

    def _ended(self) -> str:
        code = self._process.wait()
        lines = self._stderr().strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        if code < 0:
            return f"it crashed by signal {signal.Signals(-code).name}{last}"
        return f"it ended with code {code}{last}"

    def _stderr(self) -> str:
        with self._log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - _MOST_STDERR_BYTES))
            return file.read().decode(errors="replace")

    def _error(self) -> NybbleError | None:
        try:
            content = json.loads(self._error_file.read_bytes())
            return error_class(content["class"])(content["message"])
        except (OSError, ValueError, KeyError, TypeError):  # it raised none, or died while it wrote
            return None

    def _last_answer(self) -> dict[str, Any] | None:
        last: dict[str, Any] | None = None
        while True:
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return last
            try:
                content = json.loads(line or "")
            except ValueError:  # text for people, or the end
                continue
            last = content if isinstance(content, dict) else last


def report_error(error: NybbleError) -> None:
    """Tell the process that started this one, if it asked, which error ends this one."""
    file = os.environ.get(ERROR_FILE)
    if file:
        content = {"class": type(error).__name__, "message": redact(" ".join(str(error).split()))}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def _close(pipe: IO[Any]) -> None:
    try:
        pipe.close()
    except OSError:  # what was still to be written has no reader any more
        return
