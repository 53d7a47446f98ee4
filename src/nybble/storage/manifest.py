"""The manifest of a folder: the size and SHA-256 of each file in it.

It is written after all other files and read before any of them is trusted, so that a file that a crash cut short, or a
disk changed, is noticed. Run directories, checkpoints and cache entries each have one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nybble.storage.atomic import sha256_of

MANIFEST = "manifest.json"
_LARGEST_JSON = 64 << 20  # bytes; the state of a million scalars takes a third of it


class DamagedError(Exception):
    """A file is missing or differs from what was written; the message says which file and how it differs."""


def entry_of(file: Path) -> dict[str, Any]:
    """The manifest's entry for a file on disk: its size in bytes and its SHA-256."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def entries_of(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The entries of `files` by their path relative to `folder`, in sorted order."""
    return {file.relative_to(folder).as_posix(): entry_of(file) for file in sorted(files)}


def verify_files(folder: Path, entries: Mapping[str, Any]) -> None:
    """Compare files directly inside `folder` with the entries of its manifest.

    Raises:
        DamagedError: a file is missing, is a symbolic link, lies elsewhere, or has another size or hash.
    """
    for name, entry in entries.items():
        if name != Path(name).name or not isinstance(entry, dict):
            raise DamagedError(f"{MANIFEST} lists {name!r}, which is not a file inside this folder")
        file = folder / name
        try:
            if file.is_symlink():
                raise DamagedError(f"{name} is a symbolic link, not a file")
            size = file.stat().st_size
            if size != entry.get("bytes"):
                raise DamagedError(f"{name} has {size:,} bytes, the manifest says {entry.get('bytes')!r}")
            if sha256_of(file) != entry.get("sha256"):
                raise DamagedError(f"{name} differs from what was written (SHA-256)")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            raise DamagedError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedError: the file is missing, too large, or does not hold a JSON object.
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
        raise DamagedError(f"{file.name} does not hold a JSON object")
    return content
