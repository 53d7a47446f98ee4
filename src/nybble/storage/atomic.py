"""Files and folders that appear complete or not at all, even if the process dies while it writes them.

Content is written under a temporary name beside its destination, synced to disk, and then renamed. A temporary name
starts with a dot, holds the number of the writing process, and ends in `.tmp` (a file), `.partial` (a folder) or `.old`
(a folder that is being replaced). What a killed process left behind can be told by that name and is removed later.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nybble.guard import redact

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.(?:tmp|partial|old)")


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole; an existing file is replaced. Secrets in the text are masked."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(redact(text))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write, which replaces `path` when the block ends without an error."""
    temporary = _temporary(path, "tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `folder` when the block ends without an error.

    Args:
        folder: the destination. Parent folders are created.
        replace: whether a folder that exists there by then is replaced; otherwise it is left as it is.

    Raises:
        OSError: the system refuses; `folder` is then as it was.
    """
    partial = _temporary(folder, "partial")
    old = _temporary(folder, "old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
        if replace and folder.exists():
            folder.rename(old)
        if not folder.exists():
            try:
                partial.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists. It loses its name first, so that nobody sees it half empty.

    Raises:
        OSError: the system refuses.
    """
    if folder.exists():
        old = _temporary(folder, "old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def append_lines(file: Path, lines: Sequence[bytes]) -> None:
    """Append whole lines to a file, or none of them.

    Raises:
        OSError: the system refuses. The file is as it was, unless the system also refuses to shorten it: then its last
            line may be cut short.
    """
    with file.open("a+b", buffering=0) as stream:
        before = stream.tell()
        # A line that a crash cut short is ended first, so that it does not swallow the next one.
        is_cut = before and (stream.seek(-1, os.SEEK_END) or True) and stream.read(1) != b"\n"
        content = memoryview((b"\n" if is_cut else b"") + b"".join(lines))
        try:
            while content:
                content = content[stream.write(content) :]
        except OSError:
            stream.truncate(before)
            raise


def is_left_over(path: Path) -> bool:
    """Whether the name is a temporary one, which a killed process may have left behind."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".partial", ".old")


def remove_left_overs(folder: Path, of: Path | None = None) -> None:
    """Remove temporary files and folders. Call it only in the one process that writes them.

    Args:
        folder: where they are looked for.
        of: only those of this destination are removed, where one is given.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if is_left_over(path) and (of is None or (match is not None and match["name"] == of.name)):
            _remove(path)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
