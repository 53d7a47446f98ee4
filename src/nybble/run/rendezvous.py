"""How the processes of a run find each other, and how they part.

A launcher (torchrun, `accelerate launch`) starts the same command in each process and states its place in environment
variables. Without a launcher there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from nybble.errors import CannotRunError, InputError, NybbleError
from nybble.run.launch_generation import keys_of, launch_generation
from nybble.run.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_MEET = 300
# A process that is silent for longer counts as lost; one that ended is noticed at once. The limit is long because all
# processes wait while the first one of a machine packs the base.
_SECONDS_OF_SILENCE = 4 * 3600


@contextmanager
def joined(wants_cpu: bool) -> Iterator[Processes]:
    """The processes that this one was started with; inside the block they can communicate.

    Raises:
        InputError: the launcher's variables are incomplete or not numbers.
        CannotRunError: the other processes do not come or are lost, or there are fewer GPUs than processes.
    """
    processes = from_environment()
    if not processes.are_many:
        yield replace(processes, launcher=_launchers_store(processes)) if _store_outlives_start() else processes
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and not wants_cpu
    if on_gpu and processes.local_rank >= torch.cuda.device_count():
        raise CannotRunError(
            f"process {processes.rank} has no GPU of its own: this machine has {torch.cuda.device_count()}, and its "
            f"local rank, counted from 0, is {processes.local_rank}; start one process for each GPU"
        )
    if on_gpu:
        torch.cuda.set_device(processes.local_rank)
    store = _meet(processes, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield replace(processes, launcher=store) if _store_outlives_start() else processes
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        line = " ".join(str(error).split())[:160]
        raise CannotRunError(
            f"another process of the run is lost (seen by process {processes.rank}: {line}); its own message says why; "
            "start all of them again with --resume"
        ) from error
    except NybbleError:  # raised by all processes together, or by one that the others will miss
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def from_environment() -> Processes:
    """This process's place as the launcher's variables state it; nothing is communicated.

    Raises:
        InputError: the variables are incomplete or not numbers.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1":
        return Processes()
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} is not set, so the processes cannot meet; "
            "start with torchrun --nproc-per-node=N -m nybble train ..., which sets all of them"
        )
    numbers = {name: given[name] for name in _VARIABLES if name != "MASTER_ADDR"}
    for name, text in numbers.items():
        if not text.isdigit():
            raise InputError(f"{name} is {text!r}, which is not a number; start with torchrun, which sets it")
    rank = int(numbers["RANK"])
    count = int(numbers["WORLD_SIZE"])
    if rank >= count:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {count}: ranks count from 0; start with torchrun")
    on_machine = os.environ.get("LOCAL_WORLD_SIZE", "")  # not every launcher sets it
    return Processes(
        rank=rank,
        count=count,
        local_rank=int(numbers["LOCAL_RANK"]),
        local_count=int(on_machine) if on_machine.isdigit() else 1,
    )


def refuse_launcher(verb: str) -> None:
    """Refuse to run a verb that works in one process when a launcher has started several.

    Raises:
        InputError: there are several processes.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1 and os.environ.get("RANK"):
        raise InputError(
            f"nybble {verb} works in one process, and WORLD_SIZE is {count}: start it without torchrun, which is for "
            "nybble train"
        )


def _store_outlives_start() -> bool:
    """Whether the launcher keeps its store when it restarts the processes; torchrun says so in a variable."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(processes: Processes, backend: str) -> Store:
    """Join the process group; return the launcher's store."""
    import torch.distributed as dist

    store = _launchers_store(processes)
    try:
        generation = launch_generation(store, processes.rank, processes.count, _SECONDS_TO_MEET)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(keys_of(generation), store),  # type: ignore[attr-defined]
            rank=processes.rank,
            world_size=processes.count,
            timeout=timedelta(seconds=_SECONDS_OF_SILENCE),
        )
    except (RuntimeError, ValueError) as error:
        raise _not_met(processes, error) from error
    return store


def _launchers_store(processes: Processes) -> Store:
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", timeout=timedelta(seconds=_SECONDS_TO_MEET)))[0]
    except (RuntimeError, ValueError) as error:
        raise _not_met(processes, error) from error
    return store


def _not_met(processes: Processes, error: Exception) -> CannotRunError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return CannotRunError(
        f"process {processes.rank} cannot meet the {processes.count - 1} others at {where} "
        f"({' '.join(str(error).split())[:160]}); check the address, that it can be reached, and that all were started"
    )


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
