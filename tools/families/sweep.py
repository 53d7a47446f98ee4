"""Nybble over every family of the installed transformers, each as a tiny random model in a process of its own.

    python -m tools.families.sweep --out DIR                 all of them, those that are most used first
    python -m tools.families.sweep llama cond:gemma3 --out DIR

Results are lines of DIR/families.jsonl, one JSON object a family; what is there already is not done again. A process
that does not end within `--seconds` is killed, and its family has what was found until then and `stopped`. Processes
are forked from this one, which has the libraries, so that a family takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nybble.bundled import base_path
from tools.families.popular import POPULAR
from tools.families.tiny import families
from tools.forking import forking_python

RESULTS = "families.jsonl"
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class Process:
    """A family that is examined in a process of its own."""

    family: str
    number: int
    file: Path
    ends: float


def main() -> None:
    """Read the arguments, examine what has no result yet, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; default: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180, help="time limit of a family")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save", type=Path, help="write what is in DIR as one result to this file, and end")
    parser.add_argument("--without", default="", help="parts to leave out, with commas: plan,gguf")
    parser.add_argument("--tokenizer", type=Path, default=base_path(), help="folder of a tokenizer")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(families())
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    if asked.save:
        save(asked)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    done = {one["family"] for one in read_results(asked.out / RESULTS)}
    waiting = [name for name in asked.names or by_use(families()) if name not in done]
    with (
        tempfile.TemporaryDirectory(prefix="nybble-sweep-") as scratch,
        forking_python(Path(scratch) / "python") as python,
    ):
        os.environ["NYBBLE_CACHE"] = str(Path(scratch) / "cache")
        _prepare(python)
        sweep(waiting, asked, Path(scratch))


def save(asked: argparse.Namespace) -> None:
    """One result of what was found, as bench/results has them."""
    from nybble.training import software_versions

    versions = software_versions()
    told = {
        "benchmark": "families",
        "command": f"python -m tools.families.sweep --out DIR --without '{asked.without}'",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": versions.get("commit", "")[:7],
        "transformers": versions["transformers"],
        "versions": versions,
        "n_all": len(families()),
        "without": [name for name in asked.without.split(",") if name],
        "families": read_results(asked.out / RESULTS),
    }
    asked.save.write_text(json.dumps(told) + "\n", encoding="utf-8")


def by_use(names: list[str]) -> list[str]:
    """Families that people tune before the others."""
    place = {name: number for number, name in enumerate(POPULAR)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def read_results(file: Path) -> list[dict[str, Any]]:
    """The families that were examined; a line that was cut short counts as none."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def sweep(waiting: list[str], asked: argparse.Namespace, scratch: Path) -> None:
    """Examine families, `--processes` at a time."""
    running: list[Process] = []
    queue = list(waiting)
    while queue or running:
        while queue and len(running) < asked.processes:
            running.append(_started(queue.pop(0), asked, scratch))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        for process in list(running):
            code = _ended(process)
            if code is not None:
                running.remove(process)
                _keep(process, code, asked.out / RESULTS)


def _prepare(python: Path) -> None:
    """Import what takes seconds before processes are forked."""
    import torch
    import transformers

    import nybble.pipeline  # noqa: F401
    from nybble import subprocesses
    from tools.families import examine  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    subprocesses.sys = SimpleNamespace(executable=str(python))  # type: ignore[attr-defined]


def _started(family: str, asked: argparse.Namespace, scratch: Path) -> Process:
    file = scratch / f"{family.replace(':', '-')}.json"
    number = os.fork()
    if number == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            _examine(family, asked, file)
            code = 0
        finally:
            os._exit(code)
    return Process(family, number, file, time.monotonic() + asked.seconds)


def _examine(family: str, asked: argparse.Namespace, file: Path) -> None:
    from tools.families.examine import examine

    def note(found: dict[str, Any]) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)

    with file.with_suffix(".log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        examine(family, asked.tokenizer, note, without=asked.without.split(","))


def _ended(process: Process) -> int | None:
    """The exit code, once there is one; a process beyond its time is killed with what it started."""
    number, status = os.waitpid(process.number, os.WNOHANG)
    if number:
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() < process.ends:
        return None
    try:
        os.killpg(process.number, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(process.number, signal.SIGKILL)
    os.waitpid(process.number, 0)
    return -signal.SIGKILL


def _keep(process: Process, code: int, results: Path) -> None:
    found = json.loads(process.file.read_text()) if process.file.exists() else {"family": process.family, "errors": {}}
    if code:
        found["stopped"] = f"the process ended with {code}"
    with results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    parts = [f"{name} {found[name]}" for name in ("build", "stock", "qlora", "merge", "gguf") if name in found]
    sys.stdout.write(f"{process.family}: {', '.join(parts)} {found.get('stopped', '')}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
