"""The whole examination: facts, known failures, computing checks, the backends, rates; as one report."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nybble import __version__
from nybble.diagnostics import driver, wheels
from nybble.diagnostics.backends import BackendChoice, default_store, pick_backends
from nybble.diagnostics.children import TABLE, run_checks
from nybble.diagnostics.environment import prepare
from nybble.diagnostics.evidence import Evidence, Result, examine
from nybble.diagnostics.machine import Machine
from nybble.errors import RecipeError
from nybble.run.progress import ObserverChoice, watching
from nybble.storage.cache import default_folder

_DEVICES = re.compile(r"auto|cpu|(cuda|hip)(:\d{1,3})?")
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Report:
    """What `doctor` found."""

    ok: bool
    device: dict[str, Any]
    torch: dict[str, Any]  # what torch says of itself: versions, architectures, devices
    machine: dict[str, Any]
    versions: dict[str, str]
    environment: list[str]  # variables that were changed for the processes that compute
    checks: list[Result]
    not_run: dict[str, str]  # check -> why
    paths: dict[str, BackendChoice]  # by operator
    rates: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def doctor(
    device: str = "auto",
    *,
    quick: bool = False,
    machine: Machine | None = None,
    observer: ObserverChoice = "auto",
    table: str = TABLE,
) -> Report:
    """Examine this machine and compute every operator on its device, in processes of their own.

    Args:
        device: "auto", "cpu", "cuda" or "hip", or one of several GPUs, as "cuda:1".
        quick: leave out what takes long.
        machine: to be examined in place of this one; the computing is done here all the same.
        observer: receives the progress; "auto" shows it where you are, None shows nothing.
        table: the module with the computing checks.

    Raises:
        RecipeError: a device that does not exist.
    """
    if not _DEVICES.fullmatch(device):
        raise RecipeError(f"device {device!r} is unknown; allowed: auto, cpu, cuda, hip, or one of several, as cuda:1")
    started = time.monotonic()
    environment = dict(os.environ)  # of the processes that compute: this one's stays as it is
    said = prepare(environment)
    machine = machine or Machine.here()
    with watching(observer) as watch:
        run = run_checks(
            device,
            wanted=lambda check: check["is_quick"] or not quick,
            told=watch.progress,
            table=table,
            environment={**dict.fromkeys(os.environ, ""), **environment},  # what is removed is empty there
        )
    results, not_run = examine((*driver.SYMPTOMS, *wheels.SYMPTOMS), Evidence(machine, run.facts))
    choices = pick_backends(run)
    rates = {name: value for result in run.results for name, value in _rates(result).items()}
    if run.is_whole:
        default_store().save(run.fingerprint, choices, rates)
    not_run |= dict.fromkeys(run.left_out, "left out by --quick")
    checks = _without_echoes([*results, *run.results])
    return Report(
        ok=all(result.ok for result in checks),
        device=run.device,
        torch=asdict(run.facts) if run.facts else {},
        machine=_facts(machine),
        versions={"nybble": __version__}
        | {name: machine.packages[name] for name in _PACKAGES if name in machine.packages},
        environment=said,
        checks=checks,
        not_run={**not_run, **run.not_run},
        paths=choices,
        rates=rates,
        seconds=time.monotonic() - started,
    )


def _without_echoes(results: list[Result]) -> list[Result]:
    """Where a known failure explains why the device cannot be used, its fix is the device's too."""
    known = next((result for result in results if not result.ok and result.name != "device"), None)
    return [
        result.failed(result.symptom, result.cause, known.fix, known.thread)
        if result.name == "device" and known and not result.fix
        else result
        for result in results
    ]


def _rates(result: Result) -> Mapping[str, float]:
    prefix = {"memory rate": "copy_", "product rate": "", "speed of decoding": "decode_"}.get(result.name)
    return {} if prefix is None else {f"{prefix}{name}": value for name, value in result.figures.items()}


def _facts(machine: Machine) -> dict[str, Any]:
    build = machine.torch
    folder = next(path for path in (default_folder(), *default_folder().parents) if path.exists())
    return {
        "system": machine.system,
        "kernel": machine.kernel,
        "driver": machine.driver,
        "torch": build.description if build else None,
        "is_wsl": machine.is_wsl,
        "is_container": machine.is_container,
        "memory_bytes": machine.memory_bytes,
        "memory_free_bytes": machine.memory_free_bytes,
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "amd_gpus": [{**asdict(gpu), "is_apu": gpu.is_apu} for gpu in machine.amd_gpus],
        "other_processes_bytes": {str(number): held for number, held in machine.holders().items()},
    }
