"""How far the doctor's computing checks lie from float64 on this machine, over seeds: what its tolerances rest on.

Every check with a tolerance runs with its random numbers drawn anew; timed ones as they are. Prints mean, standard
deviation, mean + 6 standard deviations and the tolerance of the table, and one JSON object last.

    python -m bench.quality.doctor_tolerances --out bench/results/doctor_tolerances-epyc-2core-$(date +%F).json

It takes a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.diagnostics import blocks, checks, layers, measure, operators
from nybble.hardware import detect_device
from nybble.kernels import ladder
from nybble.training import software_versions

SEEDS = 20


def main() -> None:
    """Run, print, and write the JSON object if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON object goes as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = detect_device()
    rows = []
    print(f"{'check':<20} {'path':<8} {'mean':>10} {'std':>10} {'mean+6std':>10} {'allowed':>8}")
    for check in checks.CHECKS:
        for path in ladder(check.operator, device.torch_device) or ("",) if check.operator else ("",):
            errors = [_error(check, path, seed, device.torch_device) for seed in range(SEEDS)]
            if check.tolerance is None or None in errors:
                continue
            mean, std = statistics.mean(errors), statistics.stdev(errors)
            rows.append({"check": check.name, "path": path, "mean": mean, "std": std, "allowed": check.tolerance})
            bound = mean + 6 * std
            print(f"{check.name:<20} {path:<8} {mean:>10.4g} {std:>10.3g} {bound:>10.4g} {check.tolerance:>8g}")
    result = {"n_seeds": SEEDS, "checks": rows, "device": device.name, "versions": software_versions()}
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


def _error(check: checks.Check, path: str, seed: int, device: torch.device) -> Any:
    """The check's error with numbers of its own for each seed."""

    def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, _shift: int = seed) -> Tensor:
        return measure.normal(*shape, seed=seed + 1000 * _shift, dtype=dtype)

    for module in (blocks, checks, layers, operators):
        module.normal = normal  # type: ignore[attr-defined]
    try:
        return check.compute(device, path).error
    except measure.UnavailableError:
        return None
    finally:
        for module in (blocks, checks, layers, operators):
            module.normal = measure.normal  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
