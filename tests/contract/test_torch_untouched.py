"""A library call leaves its caller's torch and environment as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.diagnostics import examination
from nybble.diagnostics.children import Run, run_checks
from nybble.kernels import Choice, dispatcher
from nybble.run.record import Silent
from nybble.storage import cache

ROWS = [{"text": f"<s>[INST] What is {i}? [/INST] It is {i + 1}. </s>"} for i in range(24)]


def settings() -> dict[str, Any]:
    """What a caller may have set and relies on."""
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "blas": cuda.preferred_blas_library(),
        "tf32": (cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "environment": dict(os.environ),
    }


@contextmanager
def untouched() -> Iterator[None]:
    """What is set before is set afterwards."""
    before = settings()
    yield
    after = settings()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


@pytest.fixture(autouse=True)
def _unusual() -> Iterator[None]:
    """Switches that a caller has set otherwise than torch does."""
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


@pytest.fixture
def overrides(
    tiny_llama: Callable[..., Path], tmp_path: Path, machine: Callable[[Path], Any]
) -> Iterator[dict[str, Any]]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with machine(cache.default_folder()):
        yield {
            "model_name_or_path": str(tiny_llama()),
            "dataset_name": str(rows),
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "device": "cpu",
            "dataset_num_proc": 1,
            "max_new_tokens": 4,
            "report_to": "none",
            "paths": ["sdpa=math"],
        }


def test_train_ask_and_merge(overrides: dict[str, Any], tmp_path: Path) -> None:
    with untouched():
        record = nybble.train(nybble.load_recipe(None, overrides))
    assert record.paths["sdpa"] == "math"
    with untouched():
        assert nybble.ask(overrides["output_dir"], ["What is two?"])
    with untouched():
        nybble.merge(overrides["output_dir"], tmp_path / "merged")


class Failing(Silent):
    """An observer that fails in the middle of a run."""

    def stage(self, name: str) -> None:
        if name == "train":
            raise RuntimeError("in the middle")


def test_a_training_that_fails(overrides: dict[str, Any]) -> None:
    recipe = nybble.load_recipe(None, overrides)
    with untouched(), pytest.raises(RuntimeError, match="in the middle"):
        nybble.train(recipe, observer=Failing())


def test_plan(overrides: dict[str, Any]) -> None:
    with untouched():
        nybble.plan(None, overrides)


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU here needs is set for the processes that compute, and for no other."""
    given: dict[str, str] = {}

    def run_checks(_device: str, *, environment: dict[str, str], **_: Any) -> Run:
        given.update(environment)
        return Run()

    def prepare(environ: dict[str, str]) -> list[str]:
        environ["TORCH_BLAS_PREFER_HIPBLASLT"] = "0"
        del environ["PYTORCH_HIP_ALLOC_CONF"]
        return ["said"]

    monkeypatch.setenv("PYTORCH_HIP_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(examination, "run_checks", run_checks)
    monkeypatch.setattr(examination, "prepare", prepare)
    with untouched():
        report = nybble.doctor("cpu")
    assert report.environment == ["said"]
    assert (given["TORCH_BLAS_PREFER_HIPBLASLT"], given["PYTORCH_HIP_ALLOC_CONF"]) == ("0", "")


def test_the_doctors_processes(machine: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    with untouched():
        run = run_checks("cpu", wanted=lambda check: check["name"] == "before", table="planted_checks")
    assert run.is_whole


def test_settings_of_torch_hold_within_the_context_and_are_put_back_after_an_error() -> None:
    device = torch.device("cpu")
    dispatcher.choose(device, {"sdpa": Choice("math")})
    stack = ExitStack()
    with untouched():
        stack.enter_context(dispatcher.torch_settings(device))
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not stack.__exit__(KeyError, KeyError(), None)
