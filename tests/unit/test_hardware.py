"""Memory and addresses that run out are recognised, whatever library says so."""

from __future__ import annotations

import resource
from typing import Any

import psutil
import pytest
import torch

from nybble import hardware
from nybble.cli import main
from nybble.errors import CannotRunError
from nybble.hardware import detect_device, free_addresses, is_out_of_memory
from nybble.kernels.ops4bit import cpu


def limit(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (taken + left, resource.RLIM_INFINITY))


def test_a_limit_of_addresses_that_libraries_would_crash_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 1 << 30)
    with pytest.raises(CannotRunError, match=r"ulimit -v\) leaves .* of addresses"):
        detect_device("cpu")
    limit(monkeypatch, 1 << 40)
    assert detect_device("cpu").type == "cpu"


def test_free_memory_ends_where_addresses_do(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 3 << 20)
    assert hardware.free_bytes(torch.device("cpu")) == pytest.approx(3 << 20, abs=1 << 20)
    monkeypatch.undo()
    assert free_addresses() >= hardware.free_bytes(torch.device("cpu"))


def test_what_torch_says_on_a_cpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_product_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        nybble_multiply = staticmethod(lambda *_: -1)  # what the C code returns when malloc gives nothing

    monkeypatch.setattr(cpu, "load_library", Library)
    with pytest.raises(MemoryError, match="no memory for 2 rows of 64 numbers") as caught:
        cpu.multiply_dense(torch.ones(2, 64), torch.ones(8, 64))
    assert is_out_of_memory(caught.value)


def test_a_verb_that_runs_out_of_memory_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(main, "app", fail)
    assert main.run(["settings"]) == 3
    assert capsys.readouterr().err.startswith("nybble: out of memory (could not create a primitive)")
