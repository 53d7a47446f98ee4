"""Checkpoint folders: each is complete, or it is not there at all.

    checkpoint-STEP        after optimizer step STEP
    checkpoint-STEP.DONE   within the step that follows, after DONE of its micro-batches

This module knows where a checkpoint lies and whether it is undamaged; what its files mean is known where they are
written. A checkpoint is written as `nybble.storage.atomic` does it, with a manifest (`nybble.storage.manifest`) that is
written last and verified on disk before the folder gets its name. Its files are safetensors and JSON, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.storage.atomic import atomic_folder, remove_folder
from nybble.storage.manifest import MANIFEST, DamagedError, read_json, verify_files

STATE = "state.json"  # the JSON part of the training state; the other files hold tensors
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{1,18})(?:\.(\d{1,18}))?")


@dataclass(frozen=True, order=True)
class Place:
    """The point in a training at which a checkpoint was written."""

    step: int  # optimizer steps completed
    micro_batches: int = 0  # micro-batches completed of the step that follows

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return f"checkpoint-{self.step}" + (f".{self.micro_batches}" if self.micro_batches else "")

    @classmethod
    def of(cls, folder: Path) -> Place | None:
        """The place that a folder's name states, or None if the name is not that of a checkpoint."""
        match = _NAME.fullmatch(folder.name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None


def write_checkpoint(parent: Path, place: Place, files: Iterable[tuple[str, bytes]]) -> Path:
    """Write a checkpoint and return its folder, once every byte has been read back from disk and compared.

    Args:
        parent: the folder of all checkpoints. It is created if it is missing.
        place: a checkpoint that is there already is replaced.
        files: name and content of each file. They are taken one at a time, so that only one need be in memory.

    Raises:
        OSError: the system refuses; what `parent` held before is unchanged.
    """
    final = parent / place.name
    try:
        with atomic_folder(final) as partial:
            manifest = {name: _write(partial / name, content) for name, content in files}
            _write(partial / MANIFEST, json.dumps({"format": _FORMAT, "files": manifest}, indent=1).encode())
            verify(partial)
    except DamagedError as error:
        raise OSError(0, f"what was read back differs from what was written: {error}") from error
    return final


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedError: a file is missing or differs; the message says which one and how.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise DamagedError(f"{MANIFEST} has format {manifest.get('format')!r}; the known format is {_FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise DamagedError(f"{MANIFEST} does not list {STATE}")
    verify_files(folder, files)


def list_checkpoints(parents: Sequence[Path]) -> list[Path]:
    """The folders named like a checkpoint, newest first; of two at the same place, the one in the earlier parent."""
    found = []
    for parent in parents:
        try:
            found += [(place, path) for path in parent.iterdir() if (place := Place.of(path)) and path.is_dir()]
        except OSError:
            continue  # the folder does not exist, or its disk is gone
    return [path for _, path in sorted(found, key=lambda item: item[0], reverse=True)]


def newest_checkpoint(parents: Sequence[Path]) -> tuple[Path | None, Mapping[Path, str]]:
    """The newest undamaged checkpoint, and the reason why each newer one was skipped."""
    skipped: dict[Path, str] = {}
    for path in list_checkpoints(parents):
        try:
            verify(path)
        except DamagedError as error:
            skipped[path] = str(error)
        else:
            return path, skipped
    return None, skipped


def prune_checkpoints(
    parents: Sequence[Path], newest: Path, kept: int, damaged: Iterable[Path] = (), best: Place | None = None
) -> None:
    """Remove all but the last `kept` checkpoints: `newest`, which was verified, and those before it; `best` stays too.

    Checkpoints beyond `newest` belong to a course of training that was abandoned. They are removed, and so are those
    that are known to be `damaged`.

    Raises:
        OSError: a checkpoint cannot be removed.
    """
    newest_place = Place.of(newest) or Place(0)
    bad = set(damaged)
    others = [path for path in list_checkpoints(parents) if path != newest]
    good = [path for path in others if path not in bad and (Place.of(path) or Place(0)) <= newest_place]
    for path in others:
        if path not in good[: kept - 1] and not (path in good and Place.of(path) == best):
            remove_folder(path)


def _write(file: Path, content: bytes) -> dict[str, Any]:
    """Write and sync a file; return its entry in the manifest."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # verification must read the disk, not the page cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
