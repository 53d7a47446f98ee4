"""What took long to make, kept on disk: the second start does not make it again.

An entry is a folder under a key made of the content of everything that decides its bytes. It is written under a
temporary name and renamed, so it is whole or absent; sizes and hashes are checked before it is used, and a damaged one
is removed. The least recently used go first when the limit is reached. The folder is `$XDG_CACHE_HOME/nybble`
(`~/.cache/nybble`), or `$NYBBLE_CACHE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from nybble.storage.atomic import sha256_of, write_text

Kind = Literal["packed", "rows"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_SPARE = 1 << 30  # bytes left free on the disk


def digest(*parts: object) -> str:
    """A key of plain data, equal for equal data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Cache:
    """The folders of one kind; the limit is one for all kinds together."""

    def __init__(self, kind: Kind, limit_bytes: int, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder or default_folder()
        self._entries = self.folder / kind

    def path(self, key: str) -> Path:
        """Where an entry is, if it is there."""
        return self._entries / key

    def find(self, key: str) -> Path | None:
        """The entry's folder if it is there and undamaged."""
        entry = self.path(key)
        try:
            manifest = json.loads((entry / "manifest.json").read_text())
            whole = all(
                (entry / name).stat().st_size == size and sha256_of(entry / name) == sha256
                for name, (size, sha256) in manifest.items()
            )
        except (OSError, ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry)
        return entry

    def store(self, key: str, needed_bytes: int, write: Callable[[Path], None]) -> str | None:
        """Keep what `write` puts into a folder; why not, if it is not kept.

        Args:
            key: of the entry.
            needed_bytes: about what it will take.
            write: makes and fills the folder it is given.
        """
        if needed_bytes > self.limit_bytes:
            return f"is not kept ({needed_bytes:,} bytes): cache_limit is {self.limit_bytes:,} bytes"
        entry = self.path(key)
        partial = self._entries / f".{key}.{os.getpid()}"
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._evict(self.limit_bytes - needed_bytes)
            free = shutil.disk_usage(self._entries).free
            if free < needed_bytes + _SPARE:
                return f"is not kept ({needed_bytes:,} bytes): {self._entries} has {free:,} bytes left"
            write(partial)
            files = sorted(file for file in partial.iterdir() if file.is_file())
            manifest = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
            write_text(partial / "manifest.json", json.dumps(manifest))
            if not entry.exists():  # another process may have been faster
                partial.rename(entry)
        except OSError as error:
            return f"is not kept: {self._entries}: {error.strerror or error}"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return None

    def _evict(self, allowed_bytes: int) -> None:
        entries = [entry for kind in _KINDS for entry in (self.folder / kind).glob("*")]
        entries.sort(key=lambda entry: entry.stat().st_mtime)
        for left_over in [entry for entry in entries if entry.name.startswith(".")]:
            entries.remove(left_over)  # another process may be writing it, but not for a day
            if left_over.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(left_over, ignore_errors=True)
        sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in entries]
        while entries and sum(sizes) > allowed_bytes:
            shutil.rmtree(entries.pop(0), ignore_errors=True)
            sizes.pop(0)


def default_folder() -> Path:
    """Where what can be computed again is kept."""
    chosen = os.environ.get("NYBBLE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen).expanduser() if chosen else Path(base).expanduser() / "nybble"
