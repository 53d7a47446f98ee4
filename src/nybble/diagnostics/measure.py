"""The outcome of a computing check, and the unit in which results differ from their float64 reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class UnavailableError(Exception):
    """A backend or library is not available, which is not a failure of the check."""


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of a check."""

    error: float | None = None  # in the unit of the check's tolerance; None if nothing was compared
    figures: Mapping[str, float] = field(default_factory=dict)


def apart(got: Tensor, reference: Tensor) -> float:
    """The largest difference, in units of the result's machine epsilon times the reference's largest magnitude.

    It is infinite if the shapes differ or the result is not finite.

    Args:
        got: any shape and device.
        reference: float64 on the CPU, of the same shape.
    """
    if got.shape != reference.shape:
        return math.inf
    unit = torch.finfo(got.dtype).eps * max(reference.abs().max().item(), torch.finfo(torch.float32).tiny)
    error = (got.detach().cpu().double() - reference).abs().max().item() / unit
    return error if math.isfinite(error) else math.inf


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples of N(0, 1) on the CPU that are the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    """The types that training may compute in; float16 is never used on a CPU."""
    half = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return (torch.float32, *half)


def best_seconds(work: Callable[[], object], device: torch.device, budget_seconds: float = 0.4) -> float:
    """The time in seconds of the fastest of several runs; other load on the machine can only add to it."""
    work()
    best = math.inf
    stop = time.perf_counter() + budget_seconds
    while time.perf_counter() < stop:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
