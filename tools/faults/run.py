"""Trainings on a disk that fails: each system call that writes fails once, or from then on, and nothing may be lost.

    python -m tools.faults.run [--every 1]

A library that is loaded before libc (refuse.c, compiled here) makes one call below the run's folder fail: opening for
writing, write, fsync, rename, mkdir, by Python and by the libraries' native code alike. Each call of a training is
refused in five ways: no space, an I/O error and no permission, once; no space from then on; a write that does half of
its work. Whatever happens, the run must end as complete or with one of the documented errors, the newest checkpoint
that it reported complete must exist and be undamaged, and the run, resumed on a disk that works, must equal the
undisturbed one, as in tools/chaos.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.harness import witness
from nybble import pipeline
from nybble.run.quiet import quiet_libraries
from nybble.storage.checkpoints import verify
from nybble.storage.manifest import DamagedError
from nybble.training import checkpoint
from tools.chaos.run import SETTINGS as CHAOS
from tools.chaos.run import everything, fork, plan_once

SETTINGS = {**CHAOS, "gradient_accumulation_steps": 1, "max_steps": 3, "save_steps": 1}
ALWAYS = 1 << 40
WAYS = {
    "no space, once": (1, errno.ENOSPC),
    "no space, from then on": (ALWAYS, errno.ENOSPC),
    "I/O error, once": (1, errno.EIO),
    "no permission, once": (1, errno.EACCES),
    "half a write": (1, 0),
}
DOCUMENTED = (0, 2, 3)  # exit codes


@quiet_libraries()
def main() -> int:
    """Run, check, and print one JSON object; return 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="check only every n-th call")
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        return in_front_of_libc()
    began, figures, lost = time.monotonic(), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan_once(SETTINGS, folder)
        n_calls = count_calls(folder)
        expected = everything(folder / "undisturbed")
        for number in range(1, n_calls + 1, arguments.every):
            for way in WAYS:
                fault = refused(folder / "run", number, way, expected, figures)
                lost += [f"call {number}, {way}: {fault}"] if fault else []
            print(f"call {number} of {n_calls}: {dict(figures)} {lost[-1:]}", file=sys.stderr)
    found = {"calls": n_calls, **figures, "lost": lost}
    print(json.dumps({**witness("faults"), **found, "seconds": round(time.monotonic() - began)}))
    return bool(lost)


def in_front_of_libc() -> int:
    """Run this program again with the library loaded first."""
    with tempfile.TemporaryDirectory() as name:
        library = Path(name) / "refuse.so"
        source = Path(__file__).with_name("refuse.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return subprocess.run(
            [sys.executable, "-m", "tools.faults.run", *sys.argv[1:]], env=environment, check=False
        ).returncode


def count_calls(folder: Path) -> int:
    """Train undisturbed; return how many of its calls could be refused."""
    seen, out = folder / "seen", folder / "undisturbed"

    def run() -> None:
        arm(out, ALWAYS, ALWAYS, 0)
        pipeline.train(None, {**SETTINGS, "output_dir": str(out)}, observer=None)
        seen.write_text(str(ctypes.CDLL(None).refuse_seen()))

    if fork(run, folder / "err").wait() != 0:
        raise SystemExit((folder / "err").read_text())
    return int(seen.read_text())


def refused(out: Path, number: int, way: str, expected: dict[str, Any], figures: Counter[str]) -> str | None:
    """Train with call `number` refused, then resume; return what was lost, or None."""
    log, reported = out.with_suffix(".err"), out.with_suffix(".reported")
    reported.write_text("")
    calls, error = WAYS[way]
    write = checkpoint.write_checkpoint

    def report(*given: Any) -> Path:
        path = write(*given)
        reported.write_text(str(path))
        return path

    def run(resume: bool = False, fault: bool = False) -> None:
        if fault:
            checkpoint.write_checkpoint = report
            arm(out, number, number + calls - 1, error)
        settings = {**SETTINGS, "output_dir": str(out)}
        pipeline.train(None, settings, on_existing="resume" if resume else "refuse", observer=None)

    code = fork(lambda: run(fault=True), log).wait()
    figures["runs"] += 1
    figures["done all the same" if code == 0 else "ended with an error"] += 1
    fault = None
    if code not in DOCUMENTED:
        fault = f"ended with {code}: {log.read_text().strip().splitlines()[-1]}"
    newest = reported.read_text()
    if newest:
        try:
            verify(Path(newest))
        except DamagedError as damage:
            fault = f"{Path(newest).name} was reported complete: {damage}"
    if code != 0 and fork(lambda: run(resume=(out / "run.json").is_file()), log).wait() != 0:
        fault = f"could not be resumed: {log.read_text().strip().splitlines()[-1]}"
    if fault is None:
        found = everything(out)
        different = [key for key in expected if found.get(key) != expected[key]]
        fault = f"ended differently: {', '.join(different)}" if different else None
    figures["identical"] += fault is None
    shutil.rmtree(out, ignore_errors=True)
    return fault


def arm(below: Path, first: int, last: int, error: int) -> None:
    """Make calls `first` to `last` below a folder fail; see refuse.c."""
    ctypes.CDLL(None).refuse_arm(str(below).encode(), ctypes.c_long(first), ctypes.c_long(last), error)


if __name__ == "__main__":
    sys.exit(main())
