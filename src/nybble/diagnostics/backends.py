"""The backends of a run: for each operator the first that gives right results here, stored for the next run.

What the checks find is stored in a file below the cache folder, named by the fingerprint of device, driver and
versions; with another driver the fingerprint is another, and the checks run again.
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
class BackendChoice:
    """The backend of an operator, as the checks or the user chose it."""

    path: str  # its name; "" if no backend gives right results
    skipped: dict[str, str] = field(default_factory=dict)  # faster backend -> why it is not taken

    @property
    def reason(self) -> str | None:
        """Why it is not the fastest, in words."""
        return "; ".join(f"{name}: {why}" for name, why in self.skipped.items()) or None


class BackendStore:
    """What the checks found, one file for each fingerprint of device, driver and versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, fingerprint: str) -> Path:
        """Where the findings of a fingerprint are stored."""
        return self.folder / f"{fingerprint}.json"

    def choices(self, device: Device) -> dict[str, BackendChoice] | None:
        """What was found for this device, driver and versions; None if nothing was, or the file is damaged."""
        from nybble.kernels import dispatcher

        try:
            paths = self._content(device)["paths"]
            choices = {name: BackendChoice(entry["path"], dict(entry["skipped"])) for name, entry in paths.items()}
            fits = all(c.path in dispatcher.names(name, device.torch_device) for name, c in choices.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return choices if fits and choices else None

    def rates(self, device: Device) -> dict[str, float]:
        """What the doctor last measured on this device, driver and versions; empty if it has not.

        `copy_bytes_per_second`, `decode_bytes_per_second`, and `float32_flops_per_second` and so on by type.
        """
        try:
            return {name: float(rate) for name, rate in self._content(device)["rates"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def save(
        self, fingerprint: str, choices: Mapping[str, BackendChoice], rates: Mapping[str, float] | None = None
    ) -> None:
        """Write down what was found; without room or permission for it, the next run checks again."""
        if not choices or any(not choice.path for choice in choices.values()):
            return
        paths = {operator: {"path": choice.path, "skipped": choice.skipped} for operator, choice in choices.items()}
        file = self.file(fingerprint)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"paths": paths, "rates": dict(rates or {})}, indent=1) + "\n")
        except OSError:
            return

    def _content(self, device: Device) -> dict[str, Any]:
        from nybble.diagnostics.fingerprint import fingerprint

        content: dict[str, Any] = json.loads(self.file(fingerprint(device)).read_text(encoding="utf-8"))
        return content


def default_store() -> BackendStore:
    """The store below the cache folder."""
    return BackendStore(default_folder() / "paths")


def pick_backends(run: Run) -> dict[str, BackendChoice]:
    """Operator -> the first backend that passed its checks; a later one where it measured clearly faster."""
    choices = {}
    for operator, backends in run.backends.items():
        sound = [name for name, reason in backends.items() if reason is None]
        speeds = run.speeds.get(operator, {})
        best = max(sound, key=lambda name: speeds.get(name, 0.0), default="")
        if sound and speeds.get(best, 0.0) <= _CLEARLY_FASTER * speeds.get(sound[0], 0.0):
            best = sound[0]
        chosen = best if speeds else next(iter(sound), "")
        skipped = {}
        for name, reason in backends.items():
            if name == chosen:
                break
            skipped[name] = reason or f"{chosen} is {speeds[chosen] / speeds[name]:.1f} times as fast"
        choices[operator] = BackendChoice(chosen, skipped)
    return choices


def choose_backends(
    device: Device,
    asked: Sequence[str] = (),
    optim: str = "",
    note: Callable[[str], None] = lambda text: None,
    *,
    store: BackendStore | None = None,
) -> dict[str, BackendChoice]:
    """Choose the backend of every operator on `device` for this process; run the checks if they have not run here.

    Args:
        device: where training will run.
        asked: "operator=backend" each, to be taken whatever the checks found.
        optim: the optimizer of the run, by its transformers name.
        note: is called with what happens, in words.
        store: where the findings are; by default below the cache folder.

    Raises:
        RecipeError: an operator or backend that does not exist here.
        CannotRunError: no backend of an operator gives right results.
    """
    from nybble.kernels import Choice, dispatcher

    store = store or default_store()
    wanted = _read(asked, device)
    if device.backend == "hip":
        for fault in examine(wheels.SYMPTOMS, Evidence(Machine.here(), optim=optim))[0]:
            if not fault.ok:
                note(f"{fault.name}: {fault.cause}; {fault.fix}")
    choices = store.choices(device)
    if choices is None:
        choices = _found_by_checks(device, store, note)
    for operator, name in wanted.items():
        skipped = choices.get(operator, BackendChoice("")).skipped
        if name in skipped:
            note(f"{operator}: {name} is taken as asked, although {skipped[name]}")
        choices[operator] = BackendChoice(name, {})
    for operator, choice in choices.items():
        if not choice.path:
            raise CannotRunError(
                f"no path of {operator} gives right results here ({choice.reason}); run nybble doctor, "
                f"or take one all the same with --path {operator}=NAME"
            )
        for name, why in choice.skipped.items():
            note(f"{operator}: {name} is skipped: {why}")
    note(f"paths: {', '.join(f'{operator} {choice.path}' for operator, choice in choices.items())}")
    dispatcher.choose(device.torch_device, {name: Choice(c.path, c.reason) for name, c in choices.items()})
    return choices


def _found_by_checks(device: Device, store: BackendStore, note: Callable[[str], None]) -> dict[str, BackendChoice]:
    note("looking for paths that compute rightly here (once for each driver and version)")
    run = run_checks(str(device.torch_device), wanted=lambda check: bool(check["operator"]))
    # What a run that broke off did not reach is left to the self-tests in this process.
    choices = {name: choice for name, choice in pick_backends(run).items() if choice.path or run.is_whole}
    if not choices:
        causes = "; ".join(result.cause for result in run.results if not result.ok)
        note(f"the checks could not be run ({causes}); each path is tested as it is first used")
    elif run.is_whole:
        store.save(run.fingerprint, choices)
    return choices


def _read(asked: Sequence[str], device: Device) -> dict[str, str]:
    from nybble.kernels import dispatcher
    from nybble.kernels.dispatch import TABLE

    wanted = {}
    for text in asked:
        operator, _, name = (part.strip() for part in text.partition("="))
        if operator not in TABLE:
            near = difflib.get_close_matches(operator, TABLE, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"operators: {', '.join(TABLE)}"
            raise RecipeError(f"path {text!r}: unknown operator {operator!r}; {hint}")
        names = dispatcher.names(operator, device.torch_device)
        if name not in names:
            allowed = f"one of {', '.join(names)}" if names else "nothing to choose"
            raise RecipeError(f"path {text!r}: {operator} has {allowed} on {device.backend}; say {operator}=NAME")
        wanted[operator] = name
    return wanted
