"""The processes of one run: how many there are, which this one is, and how they come to agree.

A launcher (torchrun, `accelerate launch`) starts the same command in each and names them by environment variables;
torch.distributed carries what they say to each other. Without a launcher there is one process, and all of this does
nothing. What one process refuses, all refuse, with the same words and the same exit code.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nybble import errors
from nybble.errors import CannotRunError, InputError, NybbleError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_MEET = 300
# Of silence until a process that still runs counts as lost; one that ended is noticed at once. The others wait while
# the first of a machine packs a base.
_SECONDS_TO_WAIT = 4 * 3600


@dataclass(frozen=True)
class Processes:
    """Those of one run, as one of them sees them."""

    rank: int = 0  # number of this process
    count: int = 1
    local_rank: int = 0  # its number on its machine
    local_count: int = 1  # of its machine
    launcher: Store | None = field(default=None, compare=False, repr=False)  # its store, where that outlives a start

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints, and writes the run."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.count > 1

    def beside_on(self, device_type: str) -> int:
        """Processes that take of the same memory: on a CPU those of the machine; on GPUs each has its own."""
        return self.local_count if device_type == "cpu" else 1

    def note_begun(self, run: str) -> None:
        """Whatever ends this start, a later one of the same launcher shall go on with the run, named by its folder."""
        if self.is_main and self.launcher is not None:
            self.launcher.set(f"nybble/begun {run}", "")

    def have_begun(self, run: str) -> bool:
        """Whether an earlier start of the same launcher has begun the run."""
        return self.any(self.launcher is not None and self.launcher.check([f"nybble/begun {run}"]))

    def gather(self, value: Any) -> list[Any]:
        """`value` of each process, by rank; all of them wait for each other."""
        if not self.are_many:
            return [value]
        import torch.distributed

        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes; the very same bits in each."""
        if not self.are_many:
            return tensor
        import torch.distributed

        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total / self.count

    def sum(self, number: int) -> int:
        """Over all processes."""
        import torch

        return round(float(self.mean(torch.tensor(number, dtype=torch.float64))) * self.count)

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return self.sum(int(flag)) > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """At the end of the block all wait for each other; where one raised an error of ours, all do.

        Raises:
            NybbleError: its own, or that of the first process that has one.
        """
        own: NybbleError | None = None
        try:
            yield
        except NybbleError as error:
            own = error
        faults = self.gather(None if own is None else (type(own).__name__, str(own)))
        if own is not None:
            raise own
        for rank, fault in enumerate(faults):
            if fault is not None:
                raise getattr(errors, fault[0])(f"process {rank}: {fault[1]}")

    def agree(self, values: Mapping[str, Any]) -> None:
        """Compare plain data by name.

        Raises:
            InputError: a process has another value than the first.
        """
        everywhere = self.gather(dict(values))
        for rank, there in enumerate(everywhere):
            for name in {**everywhere[0], **there}:
                first, other = everywhere[0].get(name), there.get(name)
                if first != other:
                    raise InputError(
                        f"the processes of a run must be alike: {name} is {first!r} in process 0 and {other!r} in "
                        f"process {rank}; start all of them with the same recipe, files and versions"
                    )


@contextmanager
def joined(wants_cpu: bool) -> Iterator[Processes]:
    """The processes that this one was started with; within, they can talk to each other.

    Raises:
        InputError: the launcher's variables are incomplete or no numbers.
        CannotRunError: the others do not come or are lost, or there are fewer GPUs than processes.
    """
    processes = named()
    if not processes.are_many:
        yield replace(processes, launcher=_store(processes)) if _is_kept() else processes
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and not wants_cpu
    if on_gpu and processes.local_rank >= torch.cuda.device_count():
        raise CannotRunError(
            f"process {processes.rank} has no GPU of its own: {torch.cuda.device_count()} here, and it is number "
            f"{processes.local_rank} of its machine, counted from 0; start one process for each GPU"
        )
    if on_gpu:
        torch.cuda.set_device(processes.local_rank)
    store = _meet(processes, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield replace(processes, launcher=store) if _is_kept() else processes
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        line = " ".join(str(error).split())[:160]
        raise CannotRunError(
            f"another process of the run is lost (seen by process {processes.rank}: {line}); its own message says why; "
            "start all of them again with --resume"
        ) from error
    except NybbleError:  # of all processes at once, or of one that the others will miss
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def named() -> Processes:
    """As the launcher's variables say; nobody is asked.

    Raises:
        InputError: they are incomplete, or no numbers.
    """
    given = {name: os.environ[name] for name in _NEEDED if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1":
        return Processes()
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} is not set, so the processes cannot meet; "
            "start with torchrun --nproc-per-node=N -m nybble train ..., which sets all of them"
        )
    numbers = {name: given[name] for name in _NEEDED if name != "MASTER_ADDR"}
    for name, text in numbers.items():
        if not text.isdigit():
            raise InputError(f"{name} is {text!r}, which is no number; start with torchrun, which sets it")
    rank, local_rank, count = (int(numbers[name]) for name in _NEEDED[:3])
    if rank >= count:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {count}: ranks count from 0; start with torchrun")
    on_machine = os.environ.get("LOCAL_WORLD_SIZE", "")  # which not every launcher sets
    return Processes(rank, count, local_rank, int(on_machine) if on_machine.isdigit() else 1)


def refuse_many(verb: str) -> None:
    """For what works in one process.

    Raises:
        InputError: a launcher has started several.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1 and os.environ.get("RANK"):
        raise InputError(
            f"nybble {verb} works in one process, and WORLD_SIZE is {count}: start it without torchrun, which is for "
            "nybble train"
        )


def _is_kept() -> bool:
    """Whether the launcher keeps a store over its starts; torchrun says so."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(processes: Processes, backend: str) -> Store:
    """Join the others, and give back the launcher's store."""
    import torch.distributed as dist

    store, wait = _store(processes), timedelta(seconds=_SECONDS_TO_WAIT)
    try:
        start = f"nybble/start {_number_of_start(store, processes)}"
        ours = dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=ours, rank=processes.rank, world_size=processes.count, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise _not_met(processes, error) from error
    return store


def _store(processes: Processes) -> Store:
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", timeout=timedelta(seconds=_SECONDS_TO_MEET)))[0]
    except (RuntimeError, ValueError) as error:
        raise _not_met(processes, error) from error
    return store


def _not_met(processes: Processes, error: Exception) -> CannotRunError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return CannotRunError(
        f"process {processes.rank} does not meet the {processes.count - 1} others at {where} "
        f"({' '.join(str(error).split())[:160]}); check that address, that it can be reached, and that all started"
    )


def _number_of_start(store: Store, processes: Processes) -> int:
    """Which start of the launcher this is, from 1, and the same in all of its processes.

    Launchers keep their store when they begin anew, so it holds addresses of the dead, which must not be read; and they
    count restarts by machine, so no variable tells. The first process counts, and answers calls until each of the
    others has said that it knows; a call has a name of its own, so that an answer to one of the dead is read by nobody.

    Raises:
        RuntimeError: the others do not come in time.
    """
    deadline = time.monotonic() + _SECONDS_TO_MEET
    if not processes.is_main:
        call = uuid.uuid4().hex
        store.set(f"nybble/call of {processes.rank}", call)
        number = int(store.get(f"nybble/answer to {call}"))  # waits for it
        store.set(f"nybble/start {number} is known to {processes.rank}", "")
        store.get(f"nybble/start {number} is complete")
        return number
    number = store.add("nybble/starts", 1)
    others = range(1, processes.count)
    while not store.check([f"nybble/start {number} is known to {rank}" for rank in others]):
        for key in (f"nybble/call of {rank}" for rank in others):
            if store.check([key]):
                store.set(f"nybble/answer to {store.get(key).decode()}", str(number))
        if time.monotonic() > deadline:
            raise RuntimeError(f"some did not call within {_SECONDS_TO_MEET} seconds")
        time.sleep(0.02)
    store.set(f"nybble/start {number} is complete", "")
    return number


def _is_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
