"""Feed every reader of foreign files with inputs that are nearly right.

    python -m tools.fuzz.run [--share 1.0] [--only READER] [--no-guided]

There are two kinds of input: good files with random changes and, with atheris, changes that are kept if they reach new
branches of the reader's code. Each reader runs in a separate process, so that a crash is detected and named. An input
is a failure if the reader raises anything but a documented error (`nybble.errors`), if it takes longer than a second of
the processor, or if Python allocates more than ten times the file beyond what the reader needs itself (1 MiB; 6 MiB for
a recipe, which has 16 KiB at most; 4 MiB to draw a report). Memory is traced for every eighth input, because tracing
takes most of the time; the whole process may not take more than 4 GiB. Failing inputs are stored in `fuzz-failures`.
The program prints a line for each reader and one JSON object last. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble.errors import NybbleError
from tools.fuzz.inputs import changed
from tools.fuzz.readers import Reader, readers

MOST_SECONDS = 1.0
MOST_TIMES = 10  # the file's size
MOST_BYTES = 4 << 30  # of address space, whatever allocates it
TRACED = 8  # one of this many inputs has its memory traced
HANG_SECONDS = 60  # an input is given up after it
FAILURES = Path("fuzz-failures")


@dataclass
class Seen:
    """The results of one reader."""

    reader: str
    engine: str  # "changed" or "guided"
    inputs: int = 0
    traced: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    worst_bytes: int = 0  # allocated, of the input that took most beyond its allowance
    worst_file_bytes: int = 0
    worst_spare: int = 1 << 62
    failures: tuple[str, ...] = ()

    def take(self, reader: Reader, folder: Path, data: bytes) -> None:
        """Read one input and count it."""
        (folder / reader.name).write_bytes(data)
        is_traced = self.inputs % TRACED == 0
        if is_traced:
            tracemalloc.start()
            self.traced += 1
        started = time.process_time()
        fault = ""
        signal.alarm(HANG_SECONDS)
        try:
            reader.read(folder)
        except NybbleError as error:
            self.refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                fault = f"a message of {len(str(error))} characters on {str(error).count(chr(10)) + 1} lines"
        except Exception as error:  # noqa: BLE001 - what this looks for
            fault = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        seconds, took = time.process_time() - started, 0
        if is_traced:
            took = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            seconds = _untraced(reader, folder) if seconds > MOST_SECONDS else seconds
        self.inputs += 1
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        spare = reader.own_bytes + MOST_TIMES * len(data) - took
        if is_traced and spare < self.worst_spare:
            self.worst_spare, self.worst_bytes, self.worst_file_bytes = spare, took, len(data)
        if seconds > MOST_SECONDS:
            fault = fault or f"{seconds:.1f} s"
        if spare < 0:
            fault = fault or f"{took:,} bytes for a file of {len(data):,}"
        if fault:
            self.fail(fault, data)

    def fail(self, fault: str, data: bytes) -> None:
        """Store a failing input."""
        if len(self.failures) < 20:
            FAILURES.mkdir(exist_ok=True)
            kept = FAILURES / f"{self.reader.replace(', ', '-').replace(' ', '-')}-{self.engine}-{len(self.failures)}"
            kept.write_bytes(data)
            self.failures += (f"{' '.join(fault.split())[:300]} ({kept})",)


def _untraced(reader: Reader, folder: Path) -> float:
    """Seconds of the processor without the tracing of memory, which takes most of a long reading."""
    started = time.process_time()
    with suppress(Exception):
        reader.read(folder)
    return time.process_time() - started


def run_changed(name: str, share: float, first: int) -> Seen:
    """Good files changed at random."""
    reader, seen = readers()[name], Seen(name, "changed")
    signal.signal(signal.SIGALRM, _hung)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as scratch:
        folder = _prepared(reader, Path(scratch))
        for number in range(first, first + max(1, int(reader.inputs * share))):
            seen.take(reader, folder, changed(reader.seeds, number, reader.change))
    return seen


def run_guided(name: str, share: float, result: Path) -> None:
    """Inputs that follow the branches of the code; atheris ends the process itself, so what was seen is written."""
    import atheris

    signal.signal(signal.SIGALRM, _hung)
    with atheris.instrument_imports(include=["nybble", "yaml", "csv"]):
        found = readers()[name]
        folder = _prepared(found, result.parent)
    seen, wanted = Seen(name, "guided"), max(1, int(found.guided * share))
    (corpus := result.parent / "corpus").mkdir()
    for number, seed in enumerate(found.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        seen.take(found, folder, data)
        if seen.inputs >= wanted:
            result.write_text(json.dumps(asdict(seen)))

    atheris.Setup([name, f"-runs={wanted}", "-seed=1", "-max_len=4096", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def _prepared(reader: Reader, scratch: Path) -> Path:
    folder = scratch / "folder"
    folder.mkdir()
    for name, content in {**reader.beside, reader.name: reader.seeds[0]}.items():
        (folder / name).write_bytes(content)
    with suppress(NybbleError):  # once before anything is measured: imports are not the input's
        reader.read(folder)
    return folder


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - writing to disk would take most of the time


def _hung(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"hung for {HANG_SECONDS} s")


def _child(engine: str, name: str, share: float, first: int, result: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "NYBBLE_CACHE": str(result.parent)}
    present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + MOST_BYTES, resource.RLIM_INFINITY))
    if engine == "changed":
        result.write_text(json.dumps(asdict(run_changed(name, share, first))))
    else:
        run_guided(name, share, result)


def run_apart(engine: str, name: str, share: float, first: int) -> Seen:
    """Run one reader in a separate process, so that a crash or a hang ends only that process."""
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as scratch:
        result = Path(scratch) / "result.json"
        words = (engine, name, share, first, result)
        process = multiprocessing.get_context("spawn").Process(target=_child, args=words)
        process.start()
        process.join()
        if not result.is_file():
            ended = f"signal {signal.Signals(-process.exitcode).name}" if (process.exitcode or 0) < 0 else "no result"
            return Seen(name, engine, failures=(f"the process ended: {ended}, code {process.exitcode}",))
        content: dict[str, Any] = json.loads(result.read_text())
        return Seen(**content | {"failures": tuple(content["failures"])})


def main() -> int:
    """Run all readers and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of a full run")
    parser.add_argument("--first", type=int, default=0, help="number of the first input: others are other inputs")
    parser.add_argument("--only", default="", help="one reader")
    parser.add_argument("--no-guided", action="store_true", help="leave out what needs atheris")
    wanted = parser.parse_args()
    started, found = time.monotonic(), []
    for name, reader in readers().items():
        engines = ["changed"] + ["guided"] * bool(reader.guided and not wanted.no_guided)
        for engine in engines if wanted.only in ("", name) else []:
            seen = run_apart(engine, name, wanted.share, wanted.first)
            found.append(seen)
            print(
                f"{name:<20} {engine:<8} {seen.inputs:>8,} inputs, {seen.refused:>8,} refused, slowest "
                f"{seen.slowest_seconds:.3f} s, worst {seen.worst_bytes:,} bytes for {seen.worst_file_bytes:,}",
                *(f"\n    {failure}" for failure in seen.failures),
                flush=True,
            )
    total = {
        "inputs": sum(seen.inputs for seen in found),
        "failures": sum(len(seen.failures) for seen in found),
        "slowest_seconds": round(max(seen.slowest_seconds for seen in found), 3),
        "seconds": round(time.monotonic() - started),
        "python": sys.version.split()[0],
        "readers": [{k: v for k, v in asdict(seen).items() if k != "worst_spare"} for seen in found],
    }
    print(json.dumps(total))
    return int(total["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
