"""Launches of kept Triton kernels: each gets what Triton would have given it, for a device that is not here."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.speed.host_time import Driver
from nybble.kernels import triton_launch
from nybble.kernels.ops4bit.triton_kernels import OPTIONS
from nybble.kernels.pointwise import triton_kernels as kernels
from nybble.kernels.triton_launch import Launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not kept")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """What reached the driver, and what of it Triton launched itself."""
    seen: list[tuple[Any, ...]] = []
    through: list[Any] = []

    class Recorded(Driver.launcher_cls):
        def __call__(self, *arguments: Any) -> None:
            seen.append(arguments)

    recording = Driver(GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(Driver, "launcher_cls", Recorded)
    monkeypatch.setattr(driver, "_active", recording)

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        through.append(kernel)
        return _TRITONS(kernel, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton_launch, "_TRITONS_OWN", run)
    return seen, through


_TRITONS = JITFunction.run


def gated() -> Launch:
    return Launch(kernels.gated, {"is_gelu": False, "tile": 1024, "num_warps": 4, **OPTIONS})


def test_a_kept_launch_hands_over_what_triton_does(launched: tuple[list[tuple[Any, ...]], list[Any]]) -> None:
    seen, through = launched
    launch, tensors = gated(), [torch.zeros(2048, dtype=torch.bfloat16) for _ in range(3)]
    launch((2, 1), *tensors, 2048)
    launch((2, 1), *tensors, 2048)
    assert len(through) == 1
    first, second = seen
    plain = [getattr(a, "data_ptr", lambda a=a: a)() for a in first]
    assert plain[:4] == list(second[:4])  # the grid and the stream
    assert plain[-6:] == list(second[-6:]) == [*(t.data_ptr() for t in tensors), 2048, False, 1024]


@pytest.mark.parametrize(
    ("tensor", "n"),
    [
        (torch.zeros(2048, dtype=torch.float16), 2048),
        (torch.zeros(2056, dtype=torch.bfloat16)[1:2049], 2048),  # not on a multiple of 16 bytes
        (torch.zeros(2048, dtype=torch.bfloat16), 2047),
        (torch.zeros(2048, dtype=torch.bfloat16), 1),
        (torch.zeros(2048, dtype=torch.bfloat16), 1 << 31),
    ],
)
def test_arguments_of_another_kind_go_through_triton(
    tensor: torch.Tensor, n: int, launched: tuple[list[tuple[Any, ...]], list[Any]]
) -> None:
    _, through = launched
    launch, usual = gated(), torch.zeros(2048, dtype=torch.bfloat16)
    for _ in range(2):
        launch((2, 1), usual, usual, usual, 2048)
    launch((2, 1), tensor, usual, usual, n)
    assert len(through) == 2
    launch((2, 1), tensor, usual, usual, n)
    assert len(through) == 2


def test_who_takes_tritons_launch_over_sees_every_launch(
    launched: tuple[list[tuple[Any, ...]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, usual = gated(), torch.zeros(2048, dtype=torch.float32)
    launch((2, 1), usual, usual, usual, 2048)
    others: list[Any] = []

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        others.append(kernel)

    monkeypatch.setattr(JITFunction, "run", run)
    for _ in range(2):
        launch((2, 1), usual, usual, usual, 2048)
    assert others == [kernels.gated, kernels.gated]


@pytest.mark.parametrize("operator", ["rows", "dequantize_4bit", "gemv_4bit", "quantize_4bit"])
def test_a_backend_that_errs_in_its_second_launches_is_not_taken(operator: str) -> None:
    from nybble.kernels.dispatch import TABLE

    family = TABLE[operator].backends
    reference = family["cuda"][-1].load()
    seen: list[str] = []

    class Wrong:
        """The reference, whose operators fail where a test has called them before."""

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                seen.append(name)
                if seen.count(name) > calls.get(name, 1 << 30):
                    raise ArithmeticError(name)
                return getattr(reference, name)(*arguments, **options)

            return call

    calls: dict[str, int] = {}
    test = family["cpu"][0].test  # once, to count
    assert test(Wrong(), torch.device("cpu")) is None
    calls.update({name: seen.count(name) for name in seen})
    seen.clear()
    with pytest.raises(ArithmeticError):
        family["cuda"][0].test(Wrong(), torch.device("cpu"))
