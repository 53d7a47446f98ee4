"""Training takes the backends that the checks found, and checks again when the machine is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nybble.diagnostics import backends, fingerprint
from nybble.diagnostics.backends import BackendChoice, choose_backends, default_store
from nybble.diagnostics.children import Run
from nybble.diagnostics.evidence import Result
from nybble.errors import CannotRunError, RecipeError
from nybble.hardware import Device, detect_device
from nybble.kernels import dispatcher


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The CPU, with nothing found yet."""
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    return detect_device("cpu")


@pytest.fixture
def examined(device: Device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`examined(native="why not")`: the checks come to this; returns the devices that they are run on."""
    ran: list[str] = []

    def plant(**reasons: str | None) -> list[str]:
        def run_checks(kind: str, **_: Any) -> Run:
            ran.append(kind)
            ladder = {"native": reasons.get("native"), "torch": reasons.get("torch")}
            found = {"dequantize_4bit": ladder, "gemv_4bit": {"native": None, "torch": None}}
            return Run(fingerprint=fingerprint.fingerprint(device), backends=found, is_whole=True)

        monkeypatch.setattr(backends, "run_checks", run_checks)
        return ran

    return plant


def test_what_was_found_is_taken_and_kept(device: Device, examined: Callable[..., list[str]]) -> None:
    ran, notes = examined(), []
    choose_backends(device, note=notes.append)
    choose_backends(device, note=notes.append)
    assert ran == ["cpu"]
    assert notes.count("paths: dequantize_4bit native, gemv_4bit native") == 2
    assert dispatcher.choice("dequantize_4bit", device.torch_device).backend == "native"


def test_a_failing_path_is_skipped_aloud(device: Device, examined: Callable[..., list[str]]) -> None:
    examined(native="it crashed by signal SIGILL")
    notes: list[str] = []
    choose_backends(device, note=notes.append)
    assert "dequantize_4bit: native is skipped: it crashed by signal SIGILL" in notes
    assert dispatcher.choice("dequantize_4bit", device.torch_device).backend == "torch"
    reasons = {operator: choice.reason for operator, choice in dispatcher.choices(device.torch_device).items()}
    assert {operator: reason for operator, reason in reasons.items() if reason} == {
        "dequantize_4bit": "native: it crashed by signal SIGILL"
    }


def test_a_path_that_is_asked_for_is_taken_even_if_it_fails(device: Device, examined: Callable[..., list[str]]) -> None:
    examined(native="it hung")
    notes: list[str] = []
    choose_backends(device, ("dequantize_4bit=native", "gemv_4bit = torch"), note=notes.append)
    taken = dispatcher.choices(device.torch_device)
    assert (taken["dequantize_4bit"].backend, taken["gemv_4bit"].backend) == ("native", "torch")
    assert any("taken as asked, although it hung" in note for note in notes)
    choose_backends(device)
    assert dispatcher.choice("gemv_4bit", device.torch_device).backend == "native"  # asking is for one run


def test_nothing_right_is_said_before_training(device: Device, examined: Callable[..., list[str]]) -> None:
    ran = examined(native="wrong", torch="wrong too")
    for _ in range(2):  # and not kept: what was broken may have been mended
        with pytest.raises(CannotRunError, match="no path of dequantize_4bit gives right"):
            choose_backends(device)
    assert len(ran) == 2


def test_what_a_broken_off_run_had_not_come_to_is_tested_here(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Result("device", False, cause="it ended with code 1")
    cut = {"gemv_4bit": {"native": "it crashed"}, "rows": {"native": None, "torch": None}}
    monkeypatch.setattr(backends, "run_checks", lambda *_, **__: Run(backends=cut, results=[failed]))
    assert set(choose_backends(device)) == {"rows"}
    assert default_store().choices(device) is None


def test_checks_that_cannot_be_run_leave_the_tests_in_this_process(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Run(results=[Result("device", False, cause="it crashed by signal SIGKILL")])
    monkeypatch.setattr(backends, "run_checks", lambda *_, **__: failed)
    notes: list[str] = []
    assert choose_backends(device, note=notes.append) == {}
    assert "it crashed by signal SIGKILL" in notes[1]
    assert dispatcher.choice("dequantize_4bit", device.torch_device).backend == "native"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("dequantise_4bit=torch", "unknown operator 'dequantise_4bit'; did you mean 'dequantize_4bit'"),
        ("foo=torch", "operators: dequantize_4bit, gemv_4bit"),
        ("dequantize_4bit=cuda", "dequantize_4bit has one of native, torch on cpu"),
        ("dequantize_4bit", "dequantize_4bit has one of native, torch on cpu"),
        ("gemm=rocblas", "gemm has nothing to choose on cpu"),
    ],
)
def test_an_operator_or_path_that_does_not_exist_is_refused(device: Device, asked: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_backends(device, (asked,))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"paths": {}}',
        '{"paths": {"dequantize_4bit": {"path": "gone", "skipped": {}}}}',
        '{"paths": {"gone": {"path": "torch", "skipped": {}}}}',
        '{"paths": {"dequantize_4bit": {"path": "torch"}}}',
        '{"paths": {"dequantize_4bit": "torch"}}',
    ],
)
def test_a_damaged_file_is_looked_past(device: Device, content: str) -> None:
    rates = {"copy_bytes_per_second": 2.5e10}
    default_store().save(
        fingerprint.fingerprint(device), {"dequantize_4bit": BackendChoice("torch", {"native": "x"})}, rates
    )
    assert default_store().rates(device) == rates
    assert default_store().choices(device) == {"dequantize_4bit": BackendChoice("torch", {"native": "x"})}
    (file,) = default_store().folder.iterdir()
    assert json.loads(file.read_text())
    file.write_text(content)
    assert default_store().choices(device) is None
    assert default_store().rates(device) == {}


def test_another_driver_device_library_or_code_is_looked_at_anew(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(device, type="cuda", backend="hip", name="AMD Radeon RX 7900 XTX")
    seen = {fingerprint.fingerprint(device), fingerprint.fingerprint(gpu)}
    monkeypatch.setattr(fingerprint.Machine, "driver", "amdgpu 6.16.6")
    seen.add(fingerprint.fingerprint(gpu))
    monkeypatch.setattr(fingerprint.Machine, "driver", "amdgpu 6.18.1")
    seen.add(fingerprint.fingerprint(gpu))
    monkeypatch.setattr(fingerprint, "version", lambda name: "99")
    seen.add(fingerprint.fingerprint(gpu))
    monkeypatch.setattr(fingerprint, "_code", lambda: "other")
    seen.add(fingerprint.fingerprint(gpu))
    monkeypatch.setenv("TORCH_BLAS_PREFER_HIPBLASLT", "0")
    seen.add(fingerprint.fingerprint(gpu))
    assert len(seen) == 7
    assert fingerprint.fingerprint(gpu) in seen


def test_without_room_for_the_file_training_goes_on(
    device: Device, examined: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file"))
    ran = examined()
    choose_backends(device)
    choose_backends(device)
    assert ran == ["cpu", "cpu"]
