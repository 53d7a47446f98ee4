"""Which start of a launcher this is: a number that all processes of one start agree on, and that no other start has.

Why torch's own rendezvous is not enough. Launchers such as torchrun keep their key-value store when they restart the
processes, and torch puts all starts into it under the same keys: a new process may read the address of a dead one and
wait for it forever. No environment variable tells the starts apart, because `TORCHELASTIC_RESTART_COUNT` is counted by
each machine for itself: a machine whose process died counts a failure, the other machines do not. So the processes
number their start themselves, in the store, and use keys of that generation only.

How. Rank 0 increments a counter in the store, which is the number of the generation. Each other rank asks for it under
a name that no other process ever used, so that an answer to a dead process is read by nobody; it then confirms the
number. Rank 0 answers whoever asks until each rank has confirmed, and then declares the generation complete.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_SECONDS_BETWEEN_CHECKS = 0.02


def launch_generation(store: Store, rank: int, count: int, limit_seconds: float) -> int:
    """The number of this start, from 1; the same in each of its processes, which all must call this.

    Args:
        store: the launcher's store, which may hold keys of earlier starts.
        rank: this process.
        count: the number of processes.
        limit_seconds: how long rank 0 waits for the others; how long the others wait is a setting of the store.

    Raises:
        RuntimeError: the other processes do not come in time.
    """
    return _declare(store, count, limit_seconds) if rank == 0 else _ask(store, rank)


def keys_of(generation: int) -> str:
    """The prefix of the keys that belong to one generation."""
    return f"nybble/start {generation}"


def _ask(store: Store, rank: int) -> int:
    call = uuid.uuid4().hex
    store.set(f"nybble/call of {rank}", call)
    generation = int(store.get(f"nybble/answer to {call}"))  # waits until it is there
    store.set(f"{keys_of(generation)} is known to {rank}", "")
    store.get(f"{keys_of(generation)} is complete")
    return generation


def _declare(store: Store, count: int, limit_seconds: float) -> int:
    deadline = time.monotonic() + limit_seconds
    generation = int(store.add("nybble/starts", 1))
    others = range(1, count)
    while not store.check([f"{keys_of(generation)} is known to {rank}" for rank in others]):
        for key in (f"nybble/call of {rank}" for rank in others):
            if store.check([key]):
                store.set(f"nybble/answer to {store.get(key).decode()}", str(generation))
        if time.monotonic() > deadline:
            raise RuntimeError(f"some processes did not call within {limit_seconds:g} seconds")
        time.sleep(_SECONDS_BETWEEN_CHECKS)
    store.set(f"{keys_of(generation)} is complete", "")
    return generation
