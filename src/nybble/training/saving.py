"""Writing checkpoints beside the training.

What a checkpoint holds is copied to the host between two micro-batches; a thread writes, syncs and reads back the copy
while training goes on. There is one write at a time, and a write that fails is told and tried at the next save: the
training loses nothing by it. Older checkpoints go only when a newer one was read back whole.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nybble.storage.atomic import remove_left_overs
from nybble.storage.checkpoints import STATE, Place, prune_checkpoints, write_checkpoint

_LARGEST_FILE = 1 << 28  # bytes: a file is put together in memory


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, on the host."""

    place: Place
    weights: Mapping[str, Tensor]  # the trained ones
    weights_stem: str  # of their files' names
    tensors: Mapping[str, Tensor]  # all else that is a tensor
    texts: Mapping[str, str]  # file -> content
    state: Mapping[str, Any]  # goes to state.json

    def files(self, identity: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file."""
        yield from _in_files(self.weights_stem, self.weights, self.weights_stem.startswith("adapter"))
        yield from _in_files("state", self.tensors)
        for name, text in self.texts.items():
            yield name, text.encode()
        yield STATE, json.dumps({**self.state, "identity": identity}, indent=1, allow_nan=False).encode()


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a training goes on from, which was verified."""

    path: Path
    step: int
    forced: bool = False  # settings may have changed: those of the recipe count


class Saver:
    """Writes the checkpoints of one run."""

    def __init__(
        self,
        parents: Sequence[Path],
        kept: int,
        identity: Callable[[], Mapping[str, Any]],
        note: Callable[[str], None],
        resumed: Path | None = None,
        damaged: Sequence[Path] = (),
    ) -> None:
        """Nothing is written yet, but what a killed process left half is removed.

        Args:
            parents: where checkpoints go, by preference; the others are tried when the first refuses.
            kept: how many stay.
            identity: what the training is; asked for by the writing thread.
            note: is told what went wrong.
            resumed: the checkpoint that this training went on from.
            damaged: those that were found damaged.
        """
        self._parents = parents
        self._kept = kept
        self._identity = identity
        self._note = note
        self._damaged = set(damaged)
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._refused: Snapshot | None = None  # the latest, if the system refused it
        self.last_good = resumed
        self.refusal: str | None = None  # why the latest could not be written
        self.seconds = 0.0  # that the longest took to write
        for parent in parents:
            remove_left_overs(parent)

    @property
    def way_on(self) -> str:
        """What to do after an error, in words."""
        return f"go on from {self.last_good} with --resume" if self.last_good else "there is no checkpoint yet"

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; waits while the one before is written."""
        self.finish()
        if not self._parents:
            return
        if self.last_good is not None and Place.of(self.last_good) == snapshot.place:
            return  # nothing was learned since
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is being written; what the thread met that is no refusal of the system is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def close(self) -> None:
        """Wait as `finish` does; what the system refused last, with nothing newer to come, is tried once more."""
        self.finish()
        if self._refused is not None:
            self._write(self._refused)

    def _work(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            self._write(snapshot)
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that trains: see `finish`
            self._fault = error
        self.seconds = max(self.seconds, time.monotonic() - started)

    def _write(self, snapshot: Snapshot) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in snapshot.weights.values()):
            self._refuse(snapshot, "weights are no numbers any more")
            return
        self._refused = snapshot
        refusals = []
        for parent in self._parents:
            try:
                written = write_checkpoint(parent, snapshot.place, snapshot.files(self._identity()))
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror or error}")
                continue
            if refusals:
                self._note(f"{refusals[0]}; {snapshot.place.name} is in {parent}")
            self.last_good, self.refusal, self._refused = written, None, None
            self._prune(written)
            return
        self._refuse(snapshot, "; ".join(refusals))

    def _refuse(self, snapshot: Snapshot, why: str) -> None:
        self.refusal = why
        kept = f"the last good one is {self.last_good}" if self.last_good else "there is none yet"
        goes_on = "training goes on, " if self._thread is not None else ""
        self._note(f"{snapshot.place.name} could not be written ({why}); {goes_on}{kept}")

    def _prune(self, written: Path) -> None:
        try:
            prune_checkpoints(self._parents, written, self._kept, self._damaged)
        except OSError as error:
            self._note(f"an old checkpoint cannot be removed: {error.filename}: {error.strerror}")


def _in_files(stem: str, tensors: Mapping[str, Tensor], as_one: bool = False) -> Iterator[tuple[str, bytes]]:
    """As few safetensors files as keep below the largest; `as_one`: one, whatever its size."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > _LARGEST_FILE and parts[-1] and not as_one:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    for number, part in enumerate(parts, 1):
        suffix = "" if len(parts) == 1 else f"-{number:05}-of-{len(parts):05}"
        yield f"{stem}{suffix}.safetensors", save(part, metadata={"format": "pt"})
