"""Checkpoints on disk: complete, or not there at all.

    checkpoint-STEP        after optimizer step STEP
    checkpoint-STEP.DONE   within the step that follows, after DONE of its micro-batches

A checkpoint is written into a folder with a temporary name: each file is synced, `manifest.json` with the size and
SHA-256 of all others comes last, and only then the folder gets its name. A reader believes no file before it has its
size and hash, and nothing in here is a pickle: files are safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.storage.atomic import sha256_of, sync_folder

MANIFEST = "manifest.json"
STATE = "state.json"  # what a checkpoint says of itself, beside its tensors
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{1,18})(?:\.(\d{1,18}))?")
_LARGEST_JSON = 64 << 20  # bytes; a state of a million scalars has a third of it


class DamagedError(Exception):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, order=True)
class Place:
    """Where in a training a checkpoint was taken."""

    step: int  # optimizer steps that are done
    micro_batches: int = 0  # of the step under way that are done

    @property
    def name(self) -> str:
        """That of the folder."""
        return f"checkpoint-{self.step}" + (f".{self.micro_batches}" if self.micro_batches else "")

    @classmethod
    def of(cls, folder: Path) -> Place | None:
        """The place that a folder's name says, if it is that of a checkpoint."""
        match = _NAME.fullmatch(folder.name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None


def write_checkpoint(parent: Path, place: Place, files: Iterable[tuple[str, bytes]]) -> Path:
    """Write a checkpoint into `parent`, and return its folder once every byte was read back as it should be.

    Args:
        parent: is made where it is missing.
        place: a checkpoint that already has it is replaced.
        files: name and content; made one after the other, so that only one need be in memory.

    Raises:
        OSError: the system refuses; what `parent` held before is there as it was.
    """
    parent.mkdir(parents=True, exist_ok=True)
    partial, final = parent / f".{place.name}.{os.getpid()}.partial", parent / place.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        manifest = {name: _write(partial / name, content) for name, content in files}
        _write(partial / MANIFEST, json.dumps({"format": _FORMAT, "files": manifest}, indent=1).encode())
        sync_folder(partial)
        verify(partial)
        remove_checkpoint(final)
        partial.rename(final)
        sync_folder(parent)
    except DamagedError as error:
        raise OSError(0, f"read back other than written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedError: what is wrong with it, in words.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise DamagedError(f"{MANIFEST} has format {manifest.get('format')!r}, known is {_FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise DamagedError(f"{MANIFEST} does not list {STATE}")
    for name, entry in files.items():
        if name != Path(name).name or not isinstance(entry, dict):
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is no file of a checkpoint")
        file = folder / name
        try:
            size = file.lstat().st_size if not file.is_symlink() else -1
            if size != entry.get("bytes"):
                raise DamagedError(f"{name} has {size:,} bytes, the manifest says {entry.get('bytes')!r}")
            if sha256_of(file) != entry.get("sha256"):
                raise DamagedError(f"{name} is not what was written (SHA-256)")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            raise DamagedError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        DamagedError: it is missing, too large, or no JSON object.
    """
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise DamagedError(f"{file.name} has more than {_LARGEST_JSON:,} bytes")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DamagedError(f"{file.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file.name} holds no JSON object")
    return content


def list_checkpoints(parents: Sequence[Path]) -> list[Path]:
    """The folders that have a checkpoint's name, the newest first; of equal places, that of the earlier parent."""
    found = []
    for parent in parents:
        try:
            found += [(place, path) for path in parent.iterdir() if (place := Place.of(path)) and path.is_dir()]
        except OSError:
            continue  # not there, or its disk is gone
    return [path for _, path in sorted(found, key=lambda item: item[0], reverse=True)]


def newest_checkpoint(parents: Sequence[Path]) -> tuple[Path | None, Mapping[Path, str]]:
    """The newest undamaged checkpoint, and why each newer one was passed over."""
    skipped: dict[Path, str] = {}
    for path in list_checkpoints(parents):
        try:
            verify(path)
        except DamagedError as error:
            skipped[path] = str(error)
        else:
            return path, skipped
    return None, skipped


def prune_checkpoints(parents: Sequence[Path], newest: Path, kept: int, damaged: Iterable[Path] = ()) -> None:
    """Remove all but `kept` checkpoints: `newest`, which was verified, and those before it.

    What lies beyond `newest` belongs to a course that the run left; it goes, as does what is `damaged`.

    Raises:
        OSError: one cannot be removed.
    """
    place, bad = Place.of(newest), set(damaged)
    before = [path for path in list_checkpoints(parents) if path != newest]
    good = [path for path in before if path not in bad and (Place.of(path) or Place(0)) <= (place or Place(0))]
    for path in before:
        if path not in good[: kept - 1]:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, if it is there: its name first, so that it is never seen half.

    Raises:
        OSError: the system refuses.
    """
    if path.exists():
        gone = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write(file: Path, content: bytes) -> dict[str, Any]:
    """Write and sync; the file's line in the manifest."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # what is read back shall come from the disk, not from memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
