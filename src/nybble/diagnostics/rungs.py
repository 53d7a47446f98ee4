"""The ladder of paths: for each operator the first that gives right results here, kept for the next run.

What was found stands in a file below the cache folder, under the fingerprint of device, driver and versions; another
driver has another fingerprint and is looked at anew.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nybble.diagnostics import wheels
from nybble.diagnostics.children import Run, run_checks
from nybble.diagnostics.evidence import Evidence, examine
from nybble.diagnostics.machine import Machine
from nybble.errors import CannotRunError, RecipeError
from nybble.hardware import Device
from nybble.storage.atomic import write_text
from nybble.storage.cache import default_folder

_CLEARLY_FASTER = 1.1


@dataclass(frozen=True)
class Rung:
    """Where an operator stands."""

    path: str  # "" if no path gives right results
    skipped: dict[str, str] = field(default_factory=dict)  # faster path -> why it is not taken

    @property
    def reason(self) -> str | None:
        """Why not the fastest, in words."""
        return "; ".join(f"{path}: {why}" for path, why in self.skipped.items()) or None


def climb(run: Run) -> dict[str, Rung]:
    """Operator -> the first path that passed; a later one where it measured clearly faster."""
    found = {}
    for operator, paths in run.ladders.items():
        sound = [path for path, reason in paths.items() if reason is None]
        speeds = run.speeds.get(operator, {})
        best = max(sound, key=lambda path: speeds.get(path, 0.0), default="")
        if sound and speeds.get(best, 0.0) <= _CLEARLY_FASTER * speeds.get(sound[0], 0.0):
            best = sound[0]
        chosen = best if speeds else next(iter(sound), "")
        skipped = {}
        for path, reason in paths.items():
            if path == chosen:
                break
            skipped[path] = reason or f"{chosen} is {speeds[chosen] / speeds[path]:.1f} times as fast"
        found[operator] = Rung(chosen, skipped)
    return found


def settle(
    device: Device, asked: Sequence[str] = (), optim: str = "", note: Callable[[str], None] = lambda text: None
) -> dict[str, Rung]:
    """Let every operator take its rung on `device` in this process; runs the checks if they have not been run here.

    Args:
        device: where training will run.
        asked: "operator=path" each, to be taken whatever was found.
        optim: the optimizer of the run, by its transformers name.
        note: is told what is done, for people.

    Raises:
        RecipeError: an operator or path that does not exist here.
        CannotRunError: no path of an operator gives right results.
    """
    from nybble import kernels

    wanted = _read(asked, device)
    if device.backend == "hip":
        for fault in examine(wheels.SYMPTOMS, Evidence(Machine.here(), optim=optim))[0]:
            if not fault.ok:
                note(f"{fault.name}: {fault.cause}; {fault.fix}")
    rungs = known(device)
    if rungs is None:
        note("looking for paths that compute rightly here (once for each driver and version)")
        run = run_checks(device.type, wanted=lambda check: bool(check["operator"]))
        # Of a run that broke off, what it had not come to is left to the tests in this process.
        rungs = {operator: rung for operator, rung in climb(run).items() if rung.path or run.is_whole}
        if not rungs:
            told = "; ".join(result.cause for result in run.results if not result.ok)
            note(f"the checks could not be run ({told}); each path is tested as it is first used")
        elif run.is_whole:
            keep(run.fingerprint, rungs)
    for operator, path in wanted.items():
        skipped = rungs.get(operator, Rung("")).skipped
        if path in skipped:
            note(f"{operator}: {path} is taken as asked, although {skipped[path]}")
        rungs[operator] = Rung(path, {})
    for operator, rung in rungs.items():
        if not rung.path:
            raise CannotRunError(
                f"no path of {operator} gives right results here ({rung.reason}); run nybble doctor, "
                f"or take one all the same with --path {operator}=NAME"
            )
        for path, why in rung.skipped.items():
            note(f"{operator}: {path} is skipped: {why}")
    note(f"paths: {', '.join(f'{operator} {rung.path}' for operator, rung in rungs.items())}")
    kernels.take(device.torch_device, {o: kernels.Choice(rung.path, rung.reason) for o, rung in rungs.items()})
    return rungs


def known(device: Device) -> dict[str, Rung] | None:
    """What was found for this device, driver and versions; None if nothing was, or the file is damaged."""
    from nybble.diagnostics.fingerprint import fingerprint
    from nybble.kernels import ladder

    try:
        content: dict[str, Any] = json.loads(_file(fingerprint(device)).read_text(encoding="utf-8"))
        rungs = {operator: Rung(told["path"], dict(told["skipped"])) for operator, told in content["paths"].items()}
        fits = all(rung.path in ladder(operator, device.torch_device) for operator, rung in rungs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rungs if fits and rungs else None


def measured_rates(device: Device) -> dict[str, float]:
    """What the doctor last measured on this device, driver and versions, for plans; empty if it has not.

    `copy_bytes_per_second`, `decode_bytes_per_second`, and `float32_flops_per_second` and so on by type.
    """
    from nybble.diagnostics.fingerprint import fingerprint

    try:
        content = json.loads(_file(fingerprint(device)).read_text(encoding="utf-8"))
        return {name: float(rate) for name, rate in content["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(fingerprint: str, rungs: Mapping[str, Rung], rates: Mapping[str, float] | None = None) -> None:
    """Write down what was found; without room or rights for it, the next run looks again."""
    if not rungs or any(not rung.path for rung in rungs.values()):
        return
    told = {operator: {"path": rung.path, "skipped": rung.skipped} for operator, rung in rungs.items()}
    file = _file(fingerprint)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"paths": told, "rates": dict(rates or {})}, indent=1) + "\n")
    except OSError:
        return


def _file(fingerprint: str) -> Path:
    return default_folder() / "paths" / f"{fingerprint}.json"


def _read(asked: Sequence[str], device: Device) -> dict[str, str]:
    from nybble.kernels import LADDERS, ladder

    found = {}
    for text in asked:
        operator, _, path = (part.strip() for part in text.partition("="))
        if operator not in LADDERS:
            near = difflib.get_close_matches(operator, LADDERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"operators: {', '.join(LADDERS)}"
            raise RecipeError(f"path {text!r}: unknown operator {operator!r}; {hint}")
        paths = ladder(operator, device.torch_device)
        if path not in paths:
            allowed = f"one of {', '.join(paths)}" if paths else "nothing to choose"
            raise RecipeError(f"path {text!r}: {operator} has {allowed} on {device.backend}; say {operator}=NAME")
        found[operator] = path
    return found
