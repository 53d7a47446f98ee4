"""Python interpreters that have imported the libraries already: they are forked from this process.

    python server.py SOCKET

Listens on SOCKET until its stdin is closed. `client.py` stands where `sys.executable` is expected; it hands over its
arguments, folder, environment and streams. The libraries are imported when the first client comes; nothing of Nybble
is, so that a forked process sees what a fresh one would.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "torch._inductor.compile_fx",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "peft",
    "accelerate",
    "datasets",
    "gguf",
    "matplotlib.figure",
    "rich.table",
    "safetensors.torch",
    "typer",
    "yaml",
)
# Variables that libraries read when they are imported: with other values than here a process must be a fresh one.
READ_AT_IMPORT = ("HF_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH", "TRITON")
REFUSED = 1000  # an exit code that no process has
Request = dict[str, Any]


def main(path: str) -> None:
    """Serve until stdin is closed; a forked process returns from here as what its client asked for."""
    is_warm = False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while 0 not in select.select([0, listener], [], [])[0]:
            connection, _ = listener.accept()
            if not is_warm:
                warm()
                is_warm = True
            if os.fork() == 0:
                listener.close()
                keep(connection)
                return
            connection.close()


def warm() -> None:
    """Import what takes seconds."""
    for name in LIBRARIES:
        try:
            import_module(name)
        except ImportError:
            continue


def keep(connection: socket.socket) -> None:
    """Fork the client's process, pass signals on to it and its exit code back; returns in that process alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams = received(connection)
    if imports_differently(request["environment"]):
        answer(connection, REFUSED)
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        become(request, streams)
        return
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    for stream in (0, 1, 2):  # what a reader waits for would not end otherwise
        os.close(stream)
    is_asked = True
    while True:
        ready, _, _ = select.select([ended, *([connection] if is_asked else [])], [], [])
        if ended in ready:
            break
        numbers = connection.recv(64)
        is_asked = bool(numbers)
        for number in numbers or [signal.SIGKILL]:  # the client is dead
            os.kill(child, number)
    answer(connection, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def received(connection: socket.socket) -> tuple[Request, list[int]]:
    """What the client wants, and its streams."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(head, "big"))), streams


def answer(connection: socket.socket, code: int) -> None:
    """Send the exit code; a client that was killed reads no more."""
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    except OSError:
        return


def imports_differently(environment: dict[str, str]) -> bool:
    """Whether libraries would have been imported otherwise with these variables."""

    def relevant(variables: Any) -> dict[str, str]:
        named = {name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)}
        named.pop("PYTHONPATH", None)  # `run` heeds it
        return named

    return relevant(environment) != relevant(os.environ)


def become(request: Request, streams: list[int]) -> None:
    """Take over the client's streams, folder, environment and arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        import_module("transformers").logging.set_verbosity_error()
    sys.argv = request["arguments"]


def run(arguments: list[str]) -> None:
    """As `python ARGUMENTS` does."""
    is_isolated = False
    while arguments[0] in ("-I", "-u"):
        is_isolated |= arguments.pop(0) == "-I"
    kind = arguments.pop(0) if arguments[0] in ("-c", "-m") else "script"
    what, *more = arguments
    sys.argv = [what if kind == "script" else kind, *more]
    sys.path.pop(0)  # this file's folder
    if not is_isolated:
        more_paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [str(Path(what).parent) if kind == "script" else "", *filter(None, more_paths)]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    own = os.getpid()
    main(sys.argv[1])
    if os.getpid() != own:
        run(sys.argv)
