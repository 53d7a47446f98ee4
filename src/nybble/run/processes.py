"""The processes of one run: which of them this one is, and how they exchange values and errors.

`nybble.run.rendezvous` builds the value. With one process every exchange returns at once and torch is not imported.
What one process refuses, all refuse, with the same message and the same exit code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nybble.errors import InputError, NybbleError, error_class

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Processes:
    """The processes of one run, from one rank's view."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # the rank on its own machine
    local_count: int = 1  # processes on this machine
    launcher: Store | None = field(default=None, compare=False, repr=False)  # its store, if that outlives a start

    # Topology: known without communication.

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes the run directory."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """True when more than one process trains."""
        return self.count > 1

    def beside_on(self, device_type: str) -> int:
        """How many processes share this one's memory: on a CPU all of its machine; on GPUs each has its own."""
        return self.local_count if device_type == "cpu" else 1

    # The launcher's memory: it lasts from one start to the next.

    def note_begun(self, run: str) -> None:
        """Remember that the run, named by its folder, has begun, so that later starts of this launcher resume it."""
        if self.is_main and self.launcher is not None:
            self.launcher.set(f"nybble/begun {run}", "")

    def have_begun(self, run: str) -> bool:
        """Whether an earlier start of the same launcher has begun the run. All processes must call this."""
        return self.any(self.launcher is not None and self.launcher.check([f"nybble/begun {run}"]))

    # Collectives: every process must call them, in the same order.

    def gather(self, value: Any) -> list[Any]:
        """`value` of each process, by rank. Every process waits for all others."""
        if not self.are_many:
            return [value]
        import torch.distributed

        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, with the same bits in each."""
        if not self.are_many:
            return tensor
        import torch.distributed

        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def sum(self, number: int) -> int:
        """The sum over all processes."""
        import torch

        return round(float(self.mean(torch.tensor(number, dtype=torch.float64))) * self.count)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in at least one process."""
        return self.sum(int(flag)) > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """At the end of the block all processes wait for each other; if one raised a NybbleError, every one raises.

        Raises:
            NybbleError: this process's own error, or else that of the first process that has one.
        """
        own: NybbleError | None = None
        try:
            yield
        except NybbleError as error:
            own = error
        failures = self.gather(None if own is None else (type(own).__name__, str(own)))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise error_class(failure[0])(f"process {rank}: {failure[1]}")

    def agree(self, values: Mapping[str, Any]) -> None:
        """Check that plain data, by name, is the same in all processes.

        Raises:
            InputError: a process has another value than the first one.
        """
        everywhere = self.gather(dict(values))
        for rank, theirs in enumerate(everywhere):
            for name in {**everywhere[0], **theirs}:
                first, other = everywhere[0].get(name), theirs.get(name)
                if first != other:
                    raise InputError(
                        f"the processes of a run must be alike: {name} is {first!r} in process 0 and {other!r} in "
                        f"process {rank}; start all of them with the same recipe, files and versions"
                    )
