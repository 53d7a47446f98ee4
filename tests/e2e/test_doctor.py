"""`nybble doctor` as it is typed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.diagnostics import checks, examination
from nybble.diagnostics.children import Run
from nybble.diagnostics.evidence import Result
from nybble.diagnostics.machine import Machine, TorchBuild

KEYS = {"name", "ok", "max_error", "tolerance", "path", "seconds", "fix", "symptom", "cause", "thread"}


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine may slow the decoder down: that is not what is tested."""
    right = examination.run_checks
    wanted: Callable[[Any], bool] = lambda check: check["name"] != "speed of decoding"  # noqa: E731

    def run_checks(device: str, **options: Any) -> Run:
        asked = options.pop("wanted")
        return right(device, wanted=lambda check: asked(check) and wanted(check), **options)

    monkeypatch.setattr(examination, "run_checks", run_checks)


@pytest.mark.usefixtures("untimed")
@pytest.mark.fresh
def test_it_passes_here_with_every_check(nybble: Callable[..., Any]) -> None:
    done = nybble("doctor", "--json", "--device", "cpu")
    report = done.json
    assert done.code == 0, [check for check in report["checks"] if not check["ok"]]
    assert report["ok"] is True
    assert report["device"]["type"] == "cpu"
    assert all(check.keys() >= KEYS for check in report["checks"])
    ran = {check["name"] for check in report["checks"]} | {name.partition(" (")[0] for name in report["not_run"]}
    assert ran >= {check.name for check in checks.CHECKS} - {"speed of decoding"}
    assert report["paths"]["dequantize_4bit"]["path"] == "native"
    assert report["rates"]["copy_bytes_per_second"] > 0
    assert report["rates"]["bfloat16_flops_per_second"] > 0
    assert report["versions"]["torch"]
    assert report["machine"]["memory_bytes"] > report["machine"]["memory_free_bytes"] > 0
    assert report["torch"]["version"] == torch.__version__


@pytest.fixture
def without_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """`without_computing(run)`: the computing checks come to this."""
    return lambda run: monkeypatch.setattr(examination, "run_checks", lambda *_, **__: run)


def test_a_failure_is_printed_whole(nybble: Callable[..., Any], without_computing: Callable[[Run], None]) -> None:
    failed = Result("LoRA", False, "native", 40.0, 8.0, 0.1, "the loss does not fall", "far off", "pip x", "a/b#1")
    run = Run({"type": "cpu", "backend": "cpu", "name": "a chip", "total_bytes": 10**9}, results=[failed])
    run.backends = {"gemv_4bit": {"native": "it hung", "torch": None}}
    without_computing(run)
    done = nybble("doctor")
    assert done.code == 3
    for line in ("LoRA (native)", "symptom  the loss does not fall", "cause    far off", "fix      pip x"):
        assert line in done.out
    assert "thread   a/b#1" in done.out
    assert "native is skipped: it hung" in done.out
    assert "1 failed" in done.out


def test_numbers_that_are_none_become_null(
    nybble: Callable[..., Any], without_computing: Callable[[Run], None]
) -> None:
    without_computing(Run(results=[Result("x", False, max_error=float("inf"))]))
    done = nybble("doctor", "--json")
    assert done.code == 3
    assert [check["max_error"] for check in done.json["checks"] if check["name"] == "x"] == [None]


def test_a_known_failure_lends_its_fix_to_a_dead_device(
    without_computing: Callable[[Run], None], tmp_path: Path
) -> None:
    without_computing(Run(results=[Result("device", False, cause="it crashed by signal SIGABRT")]))
    card = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "class").write_text("0x038000\n")
    machine = Machine(tmp_path, {}, {}, TorchBuild("2.12.0+rocm7.2", "7.2", "7.2", None))
    report = examination.doctor(machine=machine)
    found = {check.name: check for check in report.checks if not check.ok}
    assert found["driver"].fix == found["device"].fix == "sudo modprobe amdgpu"
    assert not report.ok


def test_a_device_that_is_not_here_is_said_in_the_table(nybble: Callable[..., Any]) -> None:
    done = nybble("doctor", "--device", "cuda")
    assert done.code == 3
    assert "sees no GPU" in done.out


def test_an_unknown_device_is_the_users_fault(nybble: Callable[..., Any]) -> None:
    done = nybble("doctor", "--device", "tpu")
    assert (done.code, done.out) == (2, "")
    assert "allowed: auto, cpu, cuda, hip" in done.err


def test_the_process_that_asks_does_not_import_torch() -> None:
    code = (
        "import sys, nybble.diagnostics.examination as e; e.run_checks = lambda *a, **k: e_run(); "
        "from nybble.diagnostics.children import Run as e_run; e.doctor(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_training_says_and_keeps_its_paths(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    flags = {"model_name_or_path": tiny_llama(), "dataset_name": rows_file, "output_dir": tmp_path / "run"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = nybble("train", *words, "--max_steps", 1, "--json", "--path", "gemv_4bit=torch", "--path", "sdpa=math")
    assert done.code == 0, done.err
    assert "paths: " in done.err
    paths = done.json["paths"]
    assert (paths["gemv_4bit"], paths["sdpa"], paths["dequantize_4bit"]) == ("torch", "math", "native")
    assert nybble("train", *words, "--overwrite", "--max_steps", 1, "--path", "gemv_4bit=fast").code == 2
