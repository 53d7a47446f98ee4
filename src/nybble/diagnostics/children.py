"""Run the checks in a child process with time limits, so that a hang or a crash becomes a row of the table.

One process runs the checks one after the other. After a check that hangs, crashes or fails on a GPU, whose faults
persist in a process, a new process runs the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.diagnostics.evidence import Result, TorchFacts
from nybble.diagnostics.explain import explain
from nybble.subprocesses import Child, ChildError

TABLE = "nybble.diagnostics.checks"
START_SECONDS = 180.0


@dataclass
class Run:
    """The results of the checks."""

    device: dict[str, Any] = field(default_factory=dict)
    facts: TorchFacts | None = None
    fingerprint: str = ""
    results: list[Result] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    backends: dict[str, dict[str, str | None]] = field(default_factory=dict)  # operator -> backend -> why not
    left_out: list[str] = field(default_factory=list)  # checks that `wanted` excluded
    is_whole: bool = False  # whether every wanted check ran
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)  # operator -> backend -> flops per second


def run_checks(
    device: str = "auto",
    *,
    wanted: Callable[[Mapping[str, Any]], bool] = lambda check: True,
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
    table: str = TABLE,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run every wanted check of the module `table` on `device`.

    Args:
        device: as `nybble.hardware.detect_device` takes it.
        wanted: decides whether a check, as the worker describes it, runs.
        told: a function that is called with the name of the next check, the number of finished checks, and the total.
        table: a module with CHECKS.
        environment: variables that are set for the worker process in addition to those of this process.
    """
    run = Run()
    child = _start(table, device, environment)
    try:
        hello = child.answer(START_SECONDS)
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
                child = _start(table, device, environment)
                child.answer(START_SECONDS)
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


def _start(table: str, device: str, environment: Mapping[str, str] | None) -> Child:
    return Child(["-m", "nybble.diagnostics.worker", table, device], environment=environment)


def _one(child: Child, check: Mapping[str, Any], path: str, run: Run) -> bool:
    """Run one check with one backend; returns whether the process can run another check."""
    started = time.monotonic()
    try:
        answer = child.ask({"check": check["name"], "path": path}, check["limit_seconds"])
        is_fit = True
    except ChildError as error:
        answer = {"fault": str(error), "seconds": time.monotonic() - started}
        is_fit = False
    name = check["name"]
    operator = check["operator"]
    if "unavailable" in answer:
        run.not_run[f"{name} ({path})" if path else name] = answer["unavailable"]
        _judge(run, operator, path, answer["unavailable"])
        return True
    max_error = answer.get("error")
    tolerance = check["tolerance"]
    ok = "fault" not in answer and (tolerance is None or (max_error is not None and max_error <= tolerance))
    result = Result(
        name=name,
        ok=ok,
        path=path,
        max_error=max_error,
        tolerance=tolerance,
        seconds=answer["seconds"],
        figures=answer.get("figures", {}),
        operator=operator,
    )
    if not ok:
        cause, fix, thread = explain(answer["fault"]) if "fault" in answer else ("", "", "")
        cause = cause or f"the result differs from the reference by {max_error:.3g}; {tolerance:g} is allowed"
        fix = fix or check["fix"].format(operator=operator)
        result = result.failed(check["symptom"], cause, fix, thread or check["thread"])
    run.results.append(result)
    _judge(run, operator, path, None if ok else result.cause)
    if operator and "flops_per_second" in result.figures:
        run.speeds.setdefault(operator, {})[path] = result.figures["flops_per_second"]
    return is_fit and (ok or run.device["type"] == "cpu")


def _judge(run: Run, operator: str, path: str, reason: str | None) -> None:
    if operator:
        backends = run.backends.setdefault(operator, {})
        backends[path] = backends.get(path) or reason
