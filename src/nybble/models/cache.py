"""Packed bases on disk: the second start does not pack again.

An entry is a 4-bit checkpoint in bitsandbytes' layout under a key made of the content of the source's files and of
everything that decides the bytes. It is written under a temporary name and renamed, so it is whole or absent; sizes and
hashes are checked before it is used, and a damaged one is removed. The least recently used go first when the limit is
reached. The folder is `$XDG_CACHE_HOME/nybble` (`~/.cache/nybble`), or `$NYBBLE_CACHE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nybble.runs import cache_folder, sha256_of, write_text

# Part of every key: to be raised when an encoder's bytes change.
_ENCODER_VERSION = 1
SMALLEST = 256 << 20  # bytes of a source below which packing takes a second or two and nothing is kept
_SPARE = 1 << 30  # bytes left free on the disk


class PackedCache:
    """The folder of packed bases."""

    def __init__(self, limit_bytes: int, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder or cache_folder()

    def key(self, source: Path, settings: Mapping[str, Any]) -> str:
        """The key of what `settings` make of the checkpoint in `source`."""
        files = sorted([*source.glob("*.safetensors"), source / "config.json"])
        content = {file.name: self._content(file) for file in files}
        text = json.dumps([_ENCODER_VERSION, content, settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self, key: str) -> Path | None:
        """The entry's folder if it is there and undamaged."""
        entry = self.folder / "packed" / key
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
            write: fills the folder it is given.
        """
        if needed_bytes > self.limit_bytes:
            return f"the packed base ({needed_bytes:,} bytes) is not kept: cache_limit is {self.limit_bytes:,} bytes"
        entries = self.folder / "packed"
        partial = entries / f".{key}.{os.getpid()}"
        try:
            entries.mkdir(parents=True, exist_ok=True)
            self._evict(self.limit_bytes - needed_bytes)
            free = shutil.disk_usage(entries).free
            if free < needed_bytes + _SPARE:
                return f"the packed base ({needed_bytes:,} bytes) is not kept: {entries} has {free:,} bytes left"
            write(partial)
            files = sorted(file for file in partial.iterdir() if file.is_file())
            manifest = {file.name: [file.stat().st_size, sha256_of(file)] for file in files}
            write_text(partial / "manifest.json", json.dumps(manifest))
            if not (entries / key).exists():  # another process may have been faster
                partial.rename(entries / key)
        except OSError as error:
            return f"the packed base is not kept: {entries}: {error.strerror or error}"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return None

    def _evict(self, allowed_bytes: int) -> None:
        entries = sorted((self.folder / "packed").iterdir(), key=lambda entry: entry.stat().st_mtime)
        for left_over in [entry for entry in entries if entry.name.startswith(".")]:
            entries.remove(left_over)  # another process may be writing it, but not for a day
            if left_over.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(left_over, ignore_errors=True)
        sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in entries]
        while entries and sum(sizes) > allowed_bytes:
            shutil.rmtree(entries.pop(0), ignore_errors=True)
            sizes.pop(0)

    def _content(self, file: Path) -> str:
        """SHA-256 of a file, remembered as long as its size, time and inode stay."""
        state = file.stat()
        seen = [str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]
        memo = self.folder / "sources" / f"{hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]}.txt"
        try:
            return memo.read_text()
        except OSError:
            sha256 = sha256_of(file)
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_text(memo, sha256)
        except OSError:
            return sha256  # it will be computed again next time
        return sha256
