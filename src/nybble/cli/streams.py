"""Output that nobody reads is dropped: a pipe that was closed or a terminal that is gone ends no training.

Python raises an error at every write to such a stream, and rich ends the process at the first.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a closed pipe; a terminal that is gone


class _UnbreakableFile(io.FileIO):
    """Writes to a descriptor, and drops what has no reader."""

    def __init__(self, descriptor: int, *, drops_all: bool) -> None:
        """`drops_all`: also what the system refuses otherwise, for instance on a full disk."""
        super().__init__(descriptor, "wb", closefd=False)
        self._drops_all = drops_all

    def write(self, data: Any) -> int:
        """The bytes that were written or dropped."""
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                if not (self._drops_all or error.errno in _NOBODY_READS):
                    raise
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # another process made the pipe one that does not wait


def make_output_unbreakable() -> None:
    """For stdout and stderr of this process; of results on stdout a full disk still refuses, and says so."""
    sys.stdout, sys.stderr = unbreakable(sys.stdout), unbreakable(sys.stderr, drops_all=True)


def unbreakable(stream: TextIO, *, drops_all: bool = False) -> TextIO:
    """A stream to the same place which drops what has no reader; what is no file of the system stays as it is."""
    try:
        stream.flush()
        descriptor = stream.fileno()
        os.fstat(descriptor)
    except (AttributeError, OSError, ValueError):  # closed, or it was none from the start
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_UnbreakableFile(descriptor, drops_all=drops_all)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", True),
    )
