"""Checks in a process of their own, with time limits: a hang or a crash becomes a row of the table.

One process runs them one after another; where one hangs, dies or fails on a GPU, whose faults stay with a process, the
next ones get a new process.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

from nybble.diagnostics.evidence import Result, TorchFacts
from nybble.diagnostics.explain import explain

TABLE = "nybble.diagnostics.checks"
START_SECONDS = 180.0


class ChildError(Exception):
    """The process did not start, hung or died; says so in words."""


@dataclass
class Run:
    """What the checks came to."""

    device: dict[str, Any] = field(default_factory=dict)
    facts: TorchFacts | None = None
    fingerprint: str = ""
    results: list[Result] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    ladders: dict[str, dict[str, str | None]] = field(default_factory=dict)  # operator -> path -> why not
    left_out: list[str] = field(default_factory=list)  # checks that were not wanted
    is_whole: bool = False  # whether every wanted check was run
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)  # operator -> path -> per second


def run_checks(
    device: str = "auto",
    *,
    wanted: Callable[[Mapping[str, Any]], bool] = lambda check: True,
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
    table: str = TABLE,
) -> Run:
    """Run every wanted check of the module `table` on `device`.

    Args:
        device: "auto", "cpu", "cuda" or "hip".
        wanted: whether a check, as the worker describes it, is to be run.
        told: is called with the name of each check, how many are done, and of how many.
        table: a module with CHECKS.
    """
    run = Run()
    child = Child(table, device)
    try:
        hello = child.hello()
        run.device, run.fingerprint = hello["device"], hello["fingerprint"]
        run.facts = TorchFacts.from_json(hello["facts"])
        checks = [check for check in hello["checks"] if wanted(check)]
        run.left_out = [check["name"] for check in hello["checks"] if not wanted(check)]
        jobs = [(check, path) for check in checks for path in check["paths"]]
        is_fit = True
        for done, (check, path) in enumerate(jobs):
            told(check["name"], done, len(jobs))
            if not is_fit:
                child.close()
                child = Child(table, device)
                child.hello()
            is_fit = _one(child, check, path, run)
        run.is_whole = True
        told("checks", len(jobs), len(jobs))
    except ChildError as error:
        cause, fix, thread = explain(str(error))
        run.results.append(
            Result("device", False, symptom="nothing can be computed here", cause=cause, fix=fix, thread=thread)
        )
    finally:
        child.close()
    return run


def _one(child: Child, check: Mapping[str, Any], path: str, run: Run) -> bool:
    """Run one check by one path; whether the process is fit for another."""
    started = time.monotonic()
    try:
        answer = child.ask({"check": check["name"], "path": path}, check["limit_seconds"])
        is_fit = True
    except ChildError as error:
        answer, is_fit = {"fault": str(error), "seconds": time.monotonic() - started}, False
    name, operator = check["name"], check["operator"]
    if "unavailable" in answer:
        run.not_run[f"{name} ({path})" if path else name] = answer["unavailable"]
        _rung(run, operator, path, answer["unavailable"])
        return True
    apart, limit = answer.get("error"), check["tolerance"]
    ok = "fault" not in answer and (limit is None or (apart is not None and apart <= limit))
    result = Result(
        name, ok, path, apart, limit, answer["seconds"], figures=answer.get("figures", {}), operator=operator
    )
    if not ok:
        cause, fix, thread = explain(answer["fault"]) if "fault" in answer else ("", "", "")
        cause = cause or f"the result is {apart:.3g} from the reference; {limit:g} is allowed"
        fix = fix or check["fix"].format(operator=operator)
        result = result.failed(check["symptom"], cause, fix, thread or check["thread"])
    run.results.append(result)
    _rung(run, operator, path, None if ok else result.cause)
    if operator and "flops_per_second" in result.figures:
        run.speeds.setdefault(operator, {})[path] = result.figures["flops_per_second"]
    return is_fit and (ok or run.device["type"] == "cpu")


def _rung(run: Run, operator: str, path: str, reason: str | None) -> None:
    if operator:
        rungs = run.ladders.setdefault(operator, {})
        rungs[path] = rungs.get(path) or reason


class Child:
    """The worker, and a thread that hears it."""

    def __init__(self, table: str, device: str) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "nybble.diagnostics.worker", table, device]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)
        self._lines: queue.Queue[str] = queue.Queue()
        self._hears = threading.Thread(target=self._hear, daemon=True)
        self._hears.start()

    def hello(self) -> dict[str, Any]:
        """What the worker says first."""
        return self._heard(START_SECONDS)

    def ask(self, request: Mapping[str, str], limit_seconds: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ChildError: there is none within the limit, or the process died.
        """
        try:
            self._requests.write(f"{json.dumps(request)}\n")
            self._requests.flush()
        except OSError:
            raise ChildError(self._end()) from None
        return self._heard(limit_seconds)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._hears.join()
        for pipe in (self._requests, self._answers, self._errors):
            _close(pipe)

    def _hear(self) -> None:
        for line in self._answers:
            self._lines.put(line)
        self._lines.put("")

    def _heard(self, limit_seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_seconds)
        except queue.Empty:
            self._process.kill()
            raise ChildError(f"it hung: no answer within {limit_seconds:g} s") from None
        if not line:
            raise ChildError(self._end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        if code < 0:
            return f"it crashed by signal {signal.Signals(-code).name}{last}"
        return f"it ended with code {code}{last}"


def _close(pipe: IO[Any]) -> None:
    try:
        pipe.close()
    except OSError:  # what was still to be written has no reader any more
        return
