"""A program that does what `python` does, in a process forked from one that has imported the libraries already."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def forking_python(program: Path) -> Iterator[Path]:
    """Write the program to the file `program`, and serve it during the block; yields its path.

    Where processes cannot be waited for by a file descriptor, it is the interpreter itself.
    """
    if not hasattr(os, "pidfd_open"):
        yield Path(sys.executable)
        return
    source = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="nybble-") as folder:  # a socket's path may be no longer than 107 bytes
        path = f"{folder}/socket"
        names = f"SOCKET, PYTHON = {path!r}, {sys.executable!r}\n"
        program.write_text(f"#!{sys.executable} -IS\n{names}{(source / 'client.py').read_text()}")
        program.chmod(0o755)
        with subprocess.Popen(
            [sys.executable, source / "server.py", path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as server:
            while not Path(path).exists():
                if server.poll() is not None:
                    raise RuntimeError("the server of forked interpreters did not start")
                time.sleep(0.01)
            yield program
            if server.stdin is not None:
                server.stdin.close()
