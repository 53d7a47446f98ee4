"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, InputError
from nybble.guard import refused_by_system
from nybble.recipe import Recipe, TrainingSection
from nybble.run.directory import RunDirectory
from nybble.storage.checkpoints import STATE, Place, list_checkpoints, newest_checkpoint
from nybble.storage.manifest import DamagedError, read_json
from nybble.training.identity import Identity
from nybble.training.saving import Resumed


@dataclass(frozen=True)
class Checkpointing:
    """What the checkpoints of a run say, where they lie, and the one it goes on from."""

    identity: Callable[[], Identity]  # takes its time, and is needed by the thread that writes
    recipe: dict[str, Any]
    parents: tuple[Path, ...]  # by preference
    resumed: Resumed | None = None
    damaged: tuple[Path, ...] = ()  # passed over


@dataclass(frozen=True)
class Found:
    """An undamaged checkpoint."""

    path: Path
    place: Place
    state: dict[str, Any]  # its state.json
    damaged: tuple[Path, ...]  # newer ones, passed over

    @property
    def micro_batch(self) -> int | None:
        """Rows that went through the model at a time."""
        size = self.state.get("cursor", {}).get("groups_a_micro_batch")
        return size if isinstance(size, int) and size > 0 else None


def folders_of(run_dir: Path, section: TrainingSection) -> tuple[Path, ...]:
    """Where checkpoints of a run lie, by preference."""
    own = RunDirectory(run_dir).checkpoints
    return (own, Path(section.spare_dir).expanduser() / run_dir.absolute().name) if section.spare_dir else (own,)


@contextmanager
def refused_writes(parents: tuple[Path, ...]) -> Iterator[None]:
    """A file that cannot be written ends a run in one line, with the way on."""
    try:
        yield
    except Exception as error:
        why = refused_by_system(error)
        if why is None:
            raise
        last = next(iter(list_checkpoints(parents)), None)
        way_on = f"; what was learned is in {last}: make room and go on with --resume" if last else ""
        raise CannotRunError(f"cannot write: {why}{way_on}") from error


def find_checkpoint(parents: tuple[Path, ...], note: Callable[[str], None]) -> Found | None:
    """The newest undamaged checkpoint; `note` is told what was passed over and why. None where there is none at all.

    Raises:
        InputError: there are only damaged ones.
    """
    path, skipped = newest_checkpoint(parents)
    for passed, why in skipped.items():
        note(f"{passed.name} is passed over: {why}")
    if path is None and skipped:
        listed = "; ".join(f"{passed.name}: {why}" for passed, why in skipped.items())
        raise InputError(f"no checkpoint in {parents[0]} is undamaged ({listed}); begin anew with --overwrite")
    place = Place.of(path) if path else None
    if path is None or place is None:
        return None
    try:
        return Found(path, place, read_json(path / STATE), tuple(skipped))
    except DamagedError as error:
        raise InputError(f"{path}: {error}") from error


def checkpointing(
    recipe: Recipe,
    parents: tuple[Path, ...],
    identity: Callable[[], Identity],
    found: Found | None,
    force: bool,
    note: Callable[[str], None],
) -> Checkpointing:
    """How a run is saved, and what it goes on from.

    Raises:
        InputError: the run would be another one than that of the checkpoint, and `force` is not given.
    """
    once = cache(identity)
    resumed = None
    if found is not None:
        former = found.state.get("identity")
        differences = once().differences(former if isinstance(former, dict) else {})
        if differences and not force:
            raise InputError(
                f"{found.path.name} belongs to another training: different are {', '.join(differences)}; "
                "restore what differs, or --force to go on all the same"
            )
        if differences:
            note(f"going on by force, although different: {', '.join(differences)}")
        resumed = Resumed(found.path, found.place.step, forced=bool(differences))
        note(f"going on from {found.path}")
    return Checkpointing(once, recipe.model_dump(mode="json"), parents, resumed, found.damaged if found else ())
