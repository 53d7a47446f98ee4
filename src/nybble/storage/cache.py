"""Results that took long to compute, kept on disk so that the next start need not compute them again.

An entry is a folder. Its key is a hash of everything that decides its content, so an entry never goes out of date. It
is written as `nybble.storage.atomic` does it, its manifest is verified before it is used, and a damaged entry is
removed. When the limit is reached, the least recently used entries are removed first. The folder is `$NYBBLE_CACHE`, or
else `$XDG_CACHE_HOME/nybble` (`~/.cache/nybble`).
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

from nybble.storage.atomic import atomic_folder, write_text
from nybble.storage.manifest import MANIFEST, DamagedError, entries_of, read_json, verify_files

Kind = Literal["packed", "rows", "reference"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_RESERVE = 1 << 30  # bytes of the disk that the cache leaves free
_SECONDS_ABANDONED = 86_400  # age at which a temporary folder no longer belongs to a process that is still writing


def digest(*parts: object) -> str:
    """A key for plain data; equal data has equal keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Cache:
    """The entries of one kind. The limit in bytes applies to all kinds together."""

    def __init__(self, kind: Kind, limit_bytes: int, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder or default_folder()
        self._entries = self.folder / kind

    def path(self, key: str) -> Path:
        """The folder of an entry, whether it exists or not."""
        return self._entries / key

    def find(self, key: str) -> Path | None:
        """The folder of an entry, if it exists and is undamaged."""
        entry = self.path(key)
        try:
            verify_files(entry, read_json(entry / MANIFEST))
        except DamagedError:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry)
        return entry

    def store(self, key: str, needed_bytes: int, write: Callable[[Path], None]) -> str | None:
        """Add an entry; return the reason, for people, if it could not be added.

        Args:
            key: the entry's key.
            needed_bytes: about how much disk the entry takes.
            write: fills the empty folder that it is called with.
        """
        if needed_bytes > self.limit_bytes:
            return f"is not cached ({needed_bytes:,} bytes): cache_limit is {self.limit_bytes:,} bytes"
        entry = self.path(key)
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._evict(self.limit_bytes - needed_bytes)
            free = shutil.disk_usage(self._entries).free
            if free < needed_bytes + _RESERVE:
                return f"is not cached ({needed_bytes:,} bytes): {self._entries} has {free:,} bytes left"
            with atomic_folder(entry, replace=False) as partial:  # another process may have been faster
                write(partial)
                files = [file for file in partial.iterdir() if file.is_file()]
                write_text(partial / MANIFEST, json.dumps(entries_of(partial, files)))
        except OSError as error:
            return f"is not cached: {self._entries}: {error.strerror or error}"
        return None

    def _evict(self, allowed_bytes: int) -> None:
        """Remove the least recently used entries until all together take at most `allowed_bytes`."""
        folders = [folder for kind in _KINDS for folder in (self.folder / kind).glob("*")]
        for folder in folders:
            if folder.name.startswith(".") and folder.stat().st_mtime < time.time() - _SECONDS_ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
        entries = [folder for folder in folders if not folder.name.startswith(".")]
        entries.sort(key=lambda entry: entry.stat().st_mtime)
        sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in entries]
        while entries and sum(sizes) > allowed_bytes:
            shutil.rmtree(entries.pop(0), ignore_errors=True)
            sizes.pop(0)


def default_folder() -> Path:
    """The folder for everything that can be computed again."""
    chosen = os.environ.get("NYBBLE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen).expanduser() if chosen else Path(base).expanduser() / "nybble"
