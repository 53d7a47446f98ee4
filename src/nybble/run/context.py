"""Where a run takes place: its directory, its device, its processes, and who watches."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from nybble.hardware import Device
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer

OnExisting = Literal["refuse", "overwrite", "resume", "resume_if_any"]


@dataclass(frozen=True)
class RunContext:
    """What the stages of a run share, whatever they work on."""

    directory: RunDirectory
    device: Device
    processes: Processes
    observer: Observer
    on_existing: OnExisting = "refuse"  # what happens to a run that the directory holds; "resume_if_any" is resolved
    clock: datetime = field(
        default_factory=datetime.now
    )  # local time that chat templates are told, from its beginning on
    deadline: float | None = None  # by the monotonic clock: the run saves and stops before

    @property
    def resumes(self) -> bool:
        """Whether the run continues from a checkpoint, if there is one."""
        return self.on_existing == "resume"
