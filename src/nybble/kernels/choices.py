"""The ladders: for each operator the paths that a kind of device has, fastest first, and which rung was chosen.

A choice comes from outside, as the doctor makes it after it has run each path in a process of its own. Where none was
made, an operator takes its fastest path that passes a test in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_GPU = ("triton", "torch")
_ENGINE: dict[str, tuple[str, ...]] = {"cpu": ("native", "torch"), "cuda": _GPU, "hip": _GPU}
_ATTEND = ("varlen", "sdpa", "torch")
_SDPA = ("flash", "efficient", "math")
# Operator -> kind of device -> names of its paths, fastest first. A kind that is not named has no choice.
LADDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "dequantize_4bit": _ENGINE,
    "gemv_4bit": _ENGINE,
    "quantize_4bit": _ENGINE,
    "rows": _ENGINE,  # what happens between the products of a training step
    "attend": {"cpu": ("native", "sdpa", "torch"), "cuda": _ATTEND, "hip": _ATTEND},
    # The fastest kind of attention that torch itself may take; inputs that do not suit it go to a later one.
    "sdpa": {"cpu": ("flash", "math"), "cuda": _SDPA, "hip": _SDPA},
    "gemm": {"hip": ("hipblaslt", "rocblas")},
}


@dataclass(frozen=True)
class Choice:
    """A rung of a ladder, and why no faster one."""

    path: str
    reason: str | None = None  # in words; None for the fastest


_taken: dict[tuple[str, str], Choice] = {}  # (kind of device, operator) -> what `take` said


def kind_of(device: torch.device) -> str:
    """ "cpu", "cuda" or "hip"; ROCm's torch calls its devices cuda too."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


def ladder(operator: str, device: torch.device) -> tuple[str, ...]:
    """Names of an operator's paths on `device`, fastest first; empty where there is no choice."""
    return LADDERS[operator].get(kind_of(device), ())


def take(device: torch.device, choices: Mapping[str, Choice]) -> None:
    """Let operators run by these paths from now on, in this process."""
    for operator, chosen in choices.items():
        _taken[kind_of(device), operator] = chosen
        switch = _SWITCHES.get(operator)
        if switch is not None:
            switch(ladder(operator, device), chosen.path)


def taken(operator: str, device: torch.device) -> Choice | None:
    """What `take` said of `operator` on `device`."""
    return _taken.get((kind_of(device), operator))


def _switch_sdpa(names: tuple[str, ...], chosen: str) -> None:
    """torch's own switches: what stands above the chosen rung is off, what stands below catches other inputs."""
    allowed = names[names.index(chosen) :]
    torch.backends.cuda.enable_flash_sdp("flash" in allowed)  # they rule the CPU's kinds too
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in allowed or "efficient" not in names)
    torch.backends.cuda.enable_math_sdp(True)


def _switch_gemm(_names: tuple[str, ...], chosen: str) -> None:
    torch.backends.cuda.preferred_blas_library("cublaslt" if chosen == "hipblaslt" else "cublas")


_SWITCHES: dict[str, Callable[[tuple[str, ...], str], None]] = {"sdpa": _switch_sdpa, "gemm": _switch_gemm}
