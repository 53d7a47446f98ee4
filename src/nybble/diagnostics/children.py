"""Checks in a process of their own, with time limits: a hang or a crash becomes a row of the table.

One process runs them one after another; where one hangs, dies or fails on a GPU, whose faults stay with a process, the
next ones get a new process.
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
    """What the checks came to."""

    device: dict[str, Any] = field(default_factory=dict)
    facts: TorchFacts | None = None
    fingerprint: str = ""
    results: list[Result] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    backends: dict[str, dict[str, str | None]] = field(default_factory=dict)  # operator -> backend -> why not
    left_out: list[str] = field(default_factory=list)  # checks that were not wanted
    is_whole: bool = False  # whether every wanted check was run
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)  # operator -> path -> per second


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
        device: "auto", "cpu", "cuda" or "hip".
        wanted: whether a check, as the worker describes it, is to be run.
        told: is called with the name of each check, how many are done, and of how many.
        table: a module with CHECKS.
        environment: variables that are set for the processes that compute, besides those of this process.
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
        _judge(run, operator, path, answer["unavailable"])
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
    _judge(run, operator, path, None if ok else result.cause)
    if operator and "flops_per_second" in result.figures:
        run.speeds.setdefault(operator, {})[path] = result.figures["flops_per_second"]
    return is_fit and (ok or run.device["type"] == "cpu")


def _judge(run: Run, operator: str, path: str, reason: str | None) -> None:
    if operator:
        backends = run.backends.setdefault(operator, {})
        backends[path] = backends.get(path) or reason
