"""The recorder of a run: it writes run.json from the first moment to the last."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nybble.data import Prepared
from nybble.errors import InputError, NybbleError, StoppedError
from nybble.hardware import Device, PeakMemory, reserved_bytes
from nybble.recipe import Plan, Recipe
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Phase, RunRecord
from nybble.training.trackers import Trackers

_LIBRARIES = ("nybble", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")


class RunRecorder:
    """Measures the phases of a run and writes run.json after each; of several processes the highest peak counts."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        device: Device,
        prepared: Prepared,
        plan: Plan,
        processes: Processes = Processes(),  # noqa: B008 - a value
    ) -> None:
        self._run = run
        self._plan = plan
        self._device = device
        self._processes = processes
        self._peaks = [0] * processes.count  # the highest memory of each process
        self._started = time.monotonic()
        self.trackers = Trackers()
        self._began = False  # whether training has begun, so that there is something to keep
        self.record = RunRecord(
            status="running",
            recipe=recipe.model_dump(mode="json"),
            versions=software_versions(),
            device=asdict(device),
            rows={"ledger": asdict(prepared.ledger), "sha256": prepared.fingerprint},
            plan=plan.to_json(),
            model={},
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if processes.are_many:
            how = recipe.training.distributed
            self.record.processes = {"count": processes.count, "distributed": how, "peak_bytes": self._peaks}

    def __enter__(self) -> RunRecorder:
        self.write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self.record.status = "done"
        else:
            self.record.status = "stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed"
            self.record.notes.append(str(error) if isinstance(error, NybbleError) else type(error).__name__)
        if isinstance(error, InputError) and not self._began and self._run.last_checkpoint() is None:
            self._run.discard()
        elif isinstance(error, OSError):
            with suppress(OSError):  # the disk that refused may refuse this, too
                self.write()
        else:
            self.write()

    def write(self) -> None:
        """Write run.json as it is now."""
        record = self.record
        record.seconds = time.monotonic() - self._started
        record.peak_bytes = max((phase.measured_bytes for phase in record.phases.values()), default=None)
        reserved = reserved_bytes(self._device)
        record.reserved_bytes = None if reserved is None else max(reserved, record.reserved_bytes or 0)
        self._run.write_record(record)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure memory and time of the block, which all processes run."""
        self._began |= name == "train"
        memory = PeakMemory(self._device)
        started = time.monotonic()
        yield
        predicted = self._plan.predicted_bytes(name)
        self.record.phases[name] = Phase(predicted, 0, time.monotonic() - started)
        self.phase_peak(name, memory.peak_bytes())
        self.write()

    def phase_peak(self, name: str, measured_bytes: int) -> None:
        """Raise the peak of a phase, whose meter may have been reset within it; `measured_bytes`: in this process."""
        measured = self._processes.gather(measured_bytes)
        self._peaks[:] = map(max, self._peaks, measured)
        phase = self.record.phases[name]
        phase.measured_bytes = max(phase.measured_bytes, *measured)


def software_versions() -> dict[str, str]:
    """Versions of what computes, and the commit of a source checkout (`+dirty` when it has changes)."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if commit:
        found["commit"] = commit + ("+dirty" if _git("status", "--porcelain") else "")
    return found


def _git(*arguments: str) -> str:
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done: Any = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return str(done.stdout).strip()
