"""Files and folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nybble.guard import redact


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, sync, rename, sync of the folder. Secrets are left out."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(redact(text))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends; if it fails, nothing has changed."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            sync_folder(file)
        sync_folder(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def append_lines(file: Path, lines: Sequence[bytes]) -> None:
    """Add whole lines to a file, or none.

    Raises:
        OSError: the system refuses; the file is as it was, unless it refuses that too: then a line may be cut short.
    """
    with file.open("a+b", buffering=0) as stream:
        before = stream.tell()
        # A line cut short by a crash is ended first, so that it does not swallow this one.
        is_cut = before and (stream.seek(-1, os.SEEK_END) or True) and stream.read(1) != b"\n"
        content = memoryview((b"\n" if is_cut else b"") + b"".join(lines))
        try:
            while content:
                content = content[stream.write(content) :]
        except OSError:
            stream.truncate(before)
            raise


def is_left_over(path: Path) -> bool:
    """Whether a killed process may have left it while it wrote."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".partial", ".old")


def remove_left_overs(folder: Path) -> None:
    """Remove them; only for a process that alone writes into `folder`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_left_over(path) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif is_left_over(path):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` lasting, as `fsync` does for a file's content."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
