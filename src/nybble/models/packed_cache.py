"""Packed bases on disk, each a 4-bit checkpoint in bitsandbytes' layout: see `nybble.storage.cache`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.models.content import content_hash
from nybble.storage.atomic import write_text
from nybble.storage.cache import Cache, digest

# Part of every key; raise it when an encoder's bytes change.
_ENCODER_VERSION = 1
SMALLEST = 256 << 20  # bytes; a smaller source is packed in a second or two, and not cached


class PackedCache(Cache):
    """The folder of packed bases."""

    def __init__(self, limit_bytes: int, folder: Path | None = None) -> None:
        super().__init__("packed", limit_bytes, folder)

    def key(self, source: Path, settings: Mapping[str, Any]) -> str:
        """The key of the checkpoint in `source`, packed by `settings`."""
        files = sorted([*source.glob("*.safetensors"), source / "config.json"])
        return digest(_ENCODER_VERSION, {file.name: self.content(file) for file in files}, settings)

    def content(self, file: Path) -> str:
        """`content_hash` of a file, remembered on disk until its size, time or inode changes."""
        state = file.stat()
        seen = digest("tensors", str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino)
        memo = self.folder / "sources" / f"{seen}.txt"
        try:
            remembered = memo.read_text(encoding="ascii")
        except (OSError, UnicodeError):
            remembered = ""
        if re.fullmatch("[0-9a-f]{64}", remembered):
            return remembered
        found = content_hash(file)  # nothing is remembered, or what is was damaged
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_text(memo, found)
        except OSError:
            return found  # it will be computed again next time
        return found
