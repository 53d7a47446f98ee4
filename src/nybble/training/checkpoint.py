"""The checkpoints of a training: what they hold, how they are written beside it, and how one is continued from.

What a checkpoint holds is copied to the host between two micro-batches; a thread writes, syncs and reads back the copy
while training continues. There is one write at a time, and a write that fails is reported and tried again at the next
save: the training loses nothing by it. Older checkpoints go only when a newer one was read back whole.

    adapter_model.safetensors   the trained weights under PEFT's names (weights.safetensors without adapters)
    adapter_config.json         PEFT's, where there are adapters
    state.safetensors           every tensor of the training's state
    state.json                  the rest of the state, and what the training is: identity, recipe, versions
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from nybble.errors import CannotRunError, InputError
from nybble.guard import refused_by_system
from nybble.models import is_sharded, put_weights_back, trained_weights
from nybble.recipe import Recipe, TrainingSection
from nybble.run.directory import RunDirectory
from nybble.storage.atomic import remove_left_overs
from nybble.storage.checkpoints import (
    STATE,
    Place,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    verify,
    write_checkpoint,
)
from nybble.storage.manifest import DamagedError, read_json
from nybble.storage.shards import plan_shards
from nybble.training.fingerprint import Identity
from nybble.training.state import TrainState
from nybble.training.state_codec import CannotPackError, pack, unpack

STATE_FORMAT = 2  # the version of state.json and its tensors; raised when an older version could not read them
_ABOUT = ("format", "identity", "recipe", "versions")  # what state.json says beside the training's state
_LARGEST_FILE = 1 << 28  # bytes: a file is put together in memory


@dataclass(frozen=True)
class Found:
    """An undamaged checkpoint."""

    path: Path
    place: Place
    state: dict[str, Any]  # the content of its state.json
    damaged: tuple[Path, ...] = ()  # newer checkpoints that were skipped because they are damaged

    @property
    def micro_batch(self) -> int | None:
        """Rows that went through the model at a time."""
        size = self.state.get("cursor", {}).get("groups_a_micro_batch")
        return size if isinstance(size, int) and size > 0 else None


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a training continues from, which was verified."""

    path: Path
    step: int
    forced: bool = False  # settings may have changed, and those of the recipe count


@dataclass(frozen=True)
class Checkpointing:
    """What the checkpoints of a run say, where they lie, and the one it continues from."""

    identity: Callable[[], Identity]  # it takes seconds, so the thread that writes calls it
    recipe: dict[str, Any]
    parents: tuple[Path, ...]  # the folders for checkpoints, the preferred one first
    resumed: Resumed | None = None
    damaged: tuple[Path, ...] = ()  # newer checkpoints that are damaged and were skipped


def folders_of(run_dir: Path, section: TrainingSection) -> tuple[Path, ...]:
    """The folders of a run's checkpoints, by preference."""
    own = RunDirectory(run_dir).checkpoints
    return (own, Path(section.spare_dir).expanduser() / run_dir.absolute().name) if section.spare_dir else (own,)


def find_checkpoint(parents: tuple[Path, ...], note: Callable[[str], None]) -> Found | None:
    """The newest undamaged checkpoint, or None where there is no checkpoint at all.

    Args:
        parents: folders of checkpoints.
        note: is called with what was skipped and why.

    Raises:
        InputError: there are only damaged ones, or the newest was written in a format of another version.
    """
    path, skipped = newest_checkpoint(parents)
    for passed, why in skipped.items():
        note(f"{passed.name} is skipped: {why}")
    if path is None and skipped:
        listed = "; ".join(f"{passed.name}: {why}" for passed, why in skipped.items())
        raise InputError(f"every checkpoint in {parents[0]} is damaged ({listed}); start over with --overwrite")
    place = Place.of(path) if path else None
    if path is None or place is None:
        return None
    try:
        state = read_json(path / STATE)
    except DamagedError as error:
        raise InputError(f"{path}: {error}") from error
    if state.get("format") != STATE_FORMAT:
        versions = state.get("versions")
        version = versions.get("nybble", "another version") if isinstance(versions, dict) else "another version"
        raise InputError(
            f"{path} was written by nybble {version} in a format that this version cannot read; resume it with that "
            "version, or start over with --overwrite"
        )
    return Found(path, place, state, tuple(skipped))


def checkpointing(
    recipe: Recipe,
    parents: tuple[Path, ...],
    identity: Callable[[], Identity],
    found: Found | None,
    force: bool,
    note: Callable[[str], None],
) -> Checkpointing:
    """How a run is saved, and what it continues from.

    Raises:
        InputError: the checkpoint belongs to another training, and `force` is not given.
    """
    once = cache(identity)
    resumed = None
    if found is not None:
        former = found.state.get("identity")
        differences = once().differences(former if isinstance(former, dict) else {})
        if differences and not force:
            raise InputError(
                f"{found.path.name} belongs to another training, which differs in {', '.join(differences)}; restore "
                "what differs, or give --force to continue all the same"
            )
        if differences:
            note(f"continuing by force, although this differs: {', '.join(differences)}")
        resumed = Resumed(found.path, found.place.step, forced=bool(differences))
        note(f"continuing from {found.path}")
    return Checkpointing(once, recipe.model_dump(mode="json"), parents, resumed, found.damaged if found else ())


@contextmanager
def refused_writes(parents: tuple[Path, ...]) -> Iterator[None]:
    """A file that cannot be written ends a run in one line that says how to continue."""
    try:
        yield
    except Exception as error:
        why = refused_by_system(error)
        if why is None:
            raise
        last = next(iter(list_checkpoints(parents)), None)
        way_on = f"; the last checkpoint is {last}: free some space and continue with --resume" if last else ""
        raise CannotRunError(f"cannot write: {why}{way_on}") from error


def load_checkpoint(model: Any, state: TrainState, resumed: Resumed) -> None:
    """Continue from a checkpoint: its weights go into `model`, all else into `state`.

    Raises:
        InputError, ModelError: it is of another model, or the rows would be drawn in another order.
    """
    load_weights(model, resumed.path)
    tensors = _load_all(resumed.path, "state")
    packed = read_json(resumed.path / STATE)
    former = {name: unpack(value, tensors) for name, value in packed.items() if name not in _ABOUT}
    state.load_state_dict(former, is_forced=resumed.forced)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put the trained weights of a checkpoint into `model`.

    Raises:
        ModelError: they are of another model.
    """
    put_weights_back(model, _load_all(checkpoint, "adapter_model") or _load_all(checkpoint, "weights"))


def check_optimizer_can_be_saved(optimizer: Any, model: Any, name: str) -> None:
    """Refuse an optimizer whose state no checkpoint can hold, as soon as it has one.

    Raises:
        CannotRunError: as said.
    """
    if not is_sharded(model):
        _packed({"optimizer": optimizer.state_dict()}, None, name)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, on the host."""

    place: Place
    weights: Mapping[str, Tensor]  # the trained weights
    weights_stem: str  # the beginning of their files' names
    tensors: Mapping[str, Tensor]  # the tensors of the state
    texts: Mapping[str, str]  # file name -> content
    state: Mapping[str, Any]  # the content of state.json
    best: Place | None = None  # the checkpoint that is kept, because its weights are loaded at the end

    def files(self, identity: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file."""
        yield from _in_files(self.weights_stem, self.weights, as_one=self.weights_stem.startswith("adapter"))
        yield from _in_files("state", self.tensors)
        for name, text in self.texts.items():
            yield name, text.encode()
        yield STATE, json.dumps({**self.state, "identity": identity}, indent=1, allow_nan=False).encode()


class CheckpointWriter:
    """Writes the checkpoints of one run; without folders it writes none."""

    def __init__(
        self,
        parents: Sequence[Path],
        kept: int,
        note: Callable[[str], None],
        *,
        identity: Callable[[], Mapping[str, Any]] = dict,
        about: Mapping[str, Any] | None = None,
        resumed: Path | None = None,
        damaged: Sequence[Path] = (),
    ) -> None:
        """Remove what a killed process left half-written; nothing is written yet.

        Args:
            parents: where checkpoints go, by preference; the others are tried when the first refuses.
            kept: how many stay.
            note: is called with what went wrong.
            identity: what the training is; called by the writing thread.
            about: what state.json says besides.
            resumed: the checkpoint that this training continues from.
            damaged: those that were found damaged.
        """
        self._parents = parents
        self._kept = kept
        self._note = note
        self._identity = identity
        self._about = {"format": STATE_FORMAT, **(about or {})}
        self._damaged = set(damaged)
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._refused: Snapshot | None = None  # the latest snapshot, if the system refused to write it
        self.last_good = resumed
        self.refusal: str | None = None  # why the latest checkpoint could not be written
        self.seconds = 0.0  # the longest time that writing a checkpoint took
        self.saved = time.monotonic()  # when the latest checkpoint was begun, or the training if there is none
        for parent in parents:
            remove_left_overs(parent)

    @property
    def way_on(self) -> str:
        """What to do after an error, in words."""
        return f"continue from {self.last_good} with --resume" if self.last_good else "there is no checkpoint yet"

    def checkpoint_of(self, place: Place) -> Path | None:
        """The undamaged checkpoint at this place, if there is one."""
        for path in list_checkpoints(self._parents):
            if Place.of(path) == place:
                with suppress(DamagedError):
                    verify(path)
                    return path
        return None

    def save(self, model: Any, state: TrainState, optimizer_name: str) -> None:
        """Copy the trained weights and the state to the host, and begin to write them.

        All processes call it, since they gather what is in shards; the one that has folders writes.
        """
        self.saved = time.monotonic()
        weights, texts = trained_weights(model)
        content = state.state_dict()
        if not self._parents:
            return
        tensors: dict[str, Tensor] = {}
        packed = _packed(content, tensors, optimizer_name)
        snapshot = Snapshot(
            place=Place(state.step, state.micro_batches),
            weights={name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()},
            weights_stem="adapter_model" if texts else "weights",
            tensors=tensors,
            texts=texts,
            state={**self._about, **packed},
            best=Place(state.best.step) if state.best.is_loaded_at_end and state.best.step else None,
        )
        self.write(snapshot)

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; waits while the one before is written."""
        self.finish()
        if self.last_good is not None and Place.of(self.last_good) == snapshot.place:
            return  # nothing was learned since the latest checkpoint
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
            self._refuse(snapshot, "its weights are not finite")
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
            self._prune(written, snapshot.best)
            return
        self._refuse(snapshot, "; ".join(refusals))

    def _refuse(self, snapshot: Snapshot, why: str) -> None:
        self.refusal = why
        kept = f"the last good one is {self.last_good}" if self.last_good else "there is none yet"
        continues = "training continues, " if self._thread is not None else ""
        self._note(f"{snapshot.place.name} could not be written ({why}); {continues}{kept}")

    def _prune(self, written: Path, best: Place | None) -> None:
        try:
            prune_checkpoints(self._parents, written, self._kept, self._damaged, best)
        except OSError as error:
            self._note(f"an old checkpoint cannot be removed: {error.filename}: {error.strerror}")


def _packed(content: Mapping[str, Any], tensors: dict[str, Tensor] | None, optimizer_name: str) -> Any:
    try:
        return pack(content, tensors)
    except CannotPackError as error:
        raise CannotRunError(
            f"optim {optimizer_name}: {error}, which no checkpoint can hold; choose another, e.g. adamw_torch_fused"
        ) from error


def _load_all(folder: Path, stem: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _in_files(stem: str, tensors: Mapping[str, Tensor], *, as_one: bool = False) -> Iterator[tuple[str, bytes]]:
    """Safetensors files that stay below the largest size; `as_one`: one file, whatever its size."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = plan_shards(stem, sizes, sum(sizes.values()) if as_one else _LARGEST_FILE)
    for file, names in shards.files.items():
        yield file, save({name: tensors[name] for name in names}, metadata={"format": "pt"})
