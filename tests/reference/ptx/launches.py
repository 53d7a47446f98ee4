"""Launches of Triton kernels by the code that launches them on a GPU, with tensors on the CPU and no device.

Within `launching(target, execute)` each launch compiles its kernel for `target`, with the types, alignments and
constants of that launch, and hands the compiled kernel, the grid and the arguments to `execute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nybble.kernels.ops4bit import triton as ops4bit
from nybble.kernels.pointwise import triton as pointwise
from ptx.machine import Kernel, Memory

Execute = Callable[[Any, tuple[int, int, int], Sequence[Any]], None]
_devices = count(1000)  # Triton keeps compiled kernels by device: each use has one of its own


def wave(target: str) -> int:
    """Threads in a wave."""
    return 64 if target.startswith("gfx9") else 32


class Driver:
    """Stands where Triton asks for the device at hand."""

    def __init__(self, target: str) -> None:
        kind, number = ("hip", target) if target.startswith("gfx") else ("cuda", int(target.removeprefix("sm_")))
        self.target, self.device = GPUTarget(kind, number, wave(target)), next(_devices)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def launching(target: str, execute: Execute) -> Iterator[None]:
    """Within, launches of Triton kernels go to `execute(compiled, grid, arguments)`."""
    run, active, waves = JITFunction.run, driver._active, (ops4bit.wave_of, pointwise.wave_of)

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        kinds = compiled.src.signature
        passed = [given[name] for name in self.arg_names if kinds[name] != "constexpr"]
        execute(compiled, (*grid, 1, 1)[:3], passed)
        return compiled

    driver._active = Driver(target)
    JITFunction.run = launch
    ops4bit.wave_of = pointwise.wave_of = lambda _device: wave(target)
    try:
        yield
    finally:
        JITFunction.run, driver._active = run, active
        ops4bit.wave_of, pointwise.wave_of = waves


class Executor:
    """Executes launches for NVIDIA. `change` is applied to a kernel's PTX before it is read."""

    def __init__(
        self, change: Callable[[str], str] = lambda text: text, *, by_warp: bool = False, backwards: bool = False
    ) -> None:
        self.change, self.by_warp, self.backwards = change, by_warp, backwards
        self.kernels: dict[str, Kernel] = {}

    def __call__(self, compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        if compiled.hash not in self.kernels:
            text, about = self.change(compiled.asm["ptx"]), compiled.metadata
            self.kernels[compiled.hash] = Kernel(text, about.num_warps * 32, about.shared)
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        memory = Memory([(tensor.data_ptr(), extent(tensor)) for tensor in tensors])
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        self.kernels[compiled.hash].run(grid, values, memory, self.by_warp, self.backwards)


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first to the last that its strides reach."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
