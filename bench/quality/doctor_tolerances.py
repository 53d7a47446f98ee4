"""How far the doctor's computing checks are from float64 on this machine, over seeds: the base of its tolerances.

Every check with a tolerance runs with random numbers of its own for each seed. Printed are mean, standard deviation,
mean + 6 standard deviations and the tolerance that the doctor allows. About a minute.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.harness import Option, print_table, run
from nybble.diagnostics import blocks, checks, layers, operators
from nybble.diagnostics import measure as doctor
from nybble.hardware import detect_device
from nybble.kernels import dispatcher


def measure(asked: Namespace) -> dict[str, Any]:
    """Every check on every backend of its operator."""
    torch.set_num_threads(1)
    device = detect_device().torch_device
    rows: list[dict[str, Any]] = []

    def table() -> Iterator[tuple[str, ...]]:
        for check in checks.CHECKS:
            for path in dispatcher.names(check.operator, device) or ("",) if check.operator else ("",):
                if check.tolerance is None:
                    continue
                errors = [_error(check, path, seed, device) for seed in range(asked.seeds)]
                if None in errors:
                    continue
                mean, std = statistics.mean(errors), statistics.stdev(errors)
                rows.append({"check": check.name, "path": path, "mean": mean, "std": std, "allowed": check.tolerance})
                bound = mean + 6 * std
                yield check.name, path, f"{mean:.4g}", f"{std:.3g}", f"{bound:.4g}", f"{check.tolerance:g}"

    print_table("check | backend | mean | std | mean + 6 std | allowed", table())
    return {"checks": rows}


def _error(check: checks.Check, path: str, seed: int, device: torch.device) -> Any:
    """The check's error with numbers of its own for each seed."""

    def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, _shift: int = seed) -> Tensor:
        return doctor.normal(*shape, seed=seed + 1000 * _shift, dtype=dtype)

    for module in (blocks, checks, layers, operators):
        module.normal = normal  # type: ignore[attr-defined]
    try:
        return check.compute(device, path).error
    except doctor.UnavailableError:
        return None
    finally:
        for module in (blocks, checks, layers, operators):
            module.normal = doctor.normal  # type: ignore[attr-defined]


if __name__ == "__main__":
    run(measure, __doc__, Option("seeds", 20, tiny=2))
