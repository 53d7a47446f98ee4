"""The doctor outlives what it looks at: hangs, crashes and wrong results in a child process become rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nybble.diagnostics.backends import pick_backends
from nybble.diagnostics.children import Run, run_checks
from nybble.diagnostics.evidence import Result


@pytest.fixture(scope="module")
def planted() -> Run:
    """A run over the table beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        old = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{old}")
        return run_checks("cpu", table="planted_checks")


def row(run: Run, name: str, path: str = "") -> Result:
    (found,) = (result for result in run.results if (result.name, result.path) == (name, path))
    return found


@pytest.mark.parametrize("name", ["before", "after hang", "after crash"])
def test_what_stands_beside_a_fault_still_runs(planted: Run, name: str) -> None:
    assert row(planted, name).ok


def test_a_fault_costs_its_process_and_no_other(planted: Run) -> None:
    before, after, later = (row(planted, n).figures["process"] for n in ("before", "after hang", "after crash"))
    assert len({before, after, later, float(os.getpid())}) == 4


@pytest.mark.parametrize(
    ("name", "cause", "fix", "thread"),
    [
        ("hang", "it hung: no answer within 1 s", "export A=1", "a/b#1"),
        ("crash", "it crashed by signal SIGSEGV: Memory access fault by GPU node-1", "export B=1", "a/b#2"),
        ("leave", "it ended with code 7", "export C=1", ""),
        ("nan", "the result differs from the reference by nan; 1 is allowed", "export D=1", ""),
        ("raise", "torch has no kernels for this GPU", "nybble doctor --quick", "pytorch/pytorch#164346"),
        ("full", "the device's memory is full", "amd-smi process", ""),
    ],
)
def test_a_fault_is_reported_with_cause_fix_and_thread(
    planted: Run, name: str, cause: str, fix: str, thread: str
) -> None:
    result = row(planted, name)
    assert not result.ok
    assert cause in result.cause
    assert fix in result.fix
    assert result.thread == thread
    assert result.symptom


def test_a_broken_path_is_skipped_with_its_reason(planted: Run) -> None:
    choices = pick_backends(planted)
    assert choices["dequantize_4bit"].path == "torch"
    assert choices["dequantize_4bit"].skipped == {"native": "the result differs from the reference by 9; 1 is allowed"}
    assert choices["gemv_4bit"].path == "torch"
    assert "hung" in choices["gemv_4bit"].skipped["native"]
    assert row(planted, "ladder, wrong", "native").fix == "x --path dequantize_4bit=torch"


def test_a_device_that_is_not_there_is_one_row() -> None:
    run = run_checks("cuda")
    (result,) = run.results
    assert not result.ok
    assert "sees no GPU" in result.cause
    assert result.fix == "nybble doctor --device cpu"


def test_a_process_that_cannot_start_is_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libamdhip64.so.7: undefined symbol: hsa_x')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (result,) = run_checks("auto").results
    assert "undefined symbol: hsa_x" in result.cause
    assert result.name == "device"


def run_of(backends: dict[str, dict[str, str | None]], speeds: dict[str, dict[str, float]]) -> Run:
    return Run(backends=backends, speeds=speeds)


@pytest.mark.parametrize(
    ("reasons", "speeds", "path", "skipped"),
    [
        ((None, None), (1.0, 1.05), "hipblaslt", {}),
        ((None, None), (1.0, 2.0), "rocblas", {"hipblaslt": "rocblas is 2.0 times as fast"}),
        (("it reads past", None), (3.0, 2.0), "rocblas", {"hipblaslt": "it reads past"}),
        (("it reads past", "too"), (3.0, 2.0), "", {"hipblaslt": "it reads past", "rocblas": "too"}),
    ],
)
def test_of_right_libraries_the_clearly_faster_one_is_taken(
    reasons: tuple[str | None, ...], speeds: tuple[float, ...], path: str, skipped: dict[str, str]
) -> None:
    names = ("hipblaslt", "rocblas")
    run = run_of({"gemm": dict(zip(names, reasons, strict=True))}, {"gemm": dict(zip(names, speeds, strict=True))})
    found: Any = pick_backends(run)["gemm"]
    assert (found.path, found.skipped) == (path, skipped)
