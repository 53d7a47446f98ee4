"""The harness that every measurement shares: arguments, clocks, memory, and one JSON object of one shape.

A benchmark is a short file: a docstring that says what is measured, a function `measure(asked)` that returns its
figures, and a call of `run`. The harness reads the arguments, of which `--tiny` takes the smallest size of everything
(it shows that the program runs, and its figures mean nothing), prints the result as the last line of the output, and
writes it with `--save` to bench/results, as NAME-MACHINE-DATE.json:

    {"benchmark", "command", "date", "device", "machine", "versions", "settings", "results"}

Both sides of a comparison are measured in one run. `medians` calls the sides in turns, with the order reversed in every
other round, so that no side profits from its place. The first round fills caches and buffers and is not counted. Memory
is that of a fresh process: `watch` samples a command, `fresh` calls a function in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
REST_SECONDS = 0.02  # before a timed call: OpenMP's threads spin for a while after their work and would take its core
SAMPLE_SECONDS = 0.01

Figures = dict[str, float]


@dataclass(frozen=True)
class Option:
    """A flag of a benchmark. Its type is that of the default; a tuple is written with commas."""

    name: str
    default: Any
    tiny: Any = None  # the value under --tiny; None: the default
    help: str = ""


def run(measure: Callable[[argparse.Namespace], Any], about: str | None, *options: Option, **more: Any) -> None:
    """Read the arguments, measure, and print the result; `more` is given to `parse`."""
    name = measure.__globals__["__spec__"].name
    asked = parse(name, about or "", options, **more)
    part = getattr(asked, "part", "")
    settings = {key: value for key, value in vars(asked).items() if key not in ("save", "part")}
    named = name.rpartition(".")[2] + (f"_{part}" if part else "")
    result = {**witness(named), "settings": settings, "results": measure(asked)}
    text = portable(json.dumps(result, default=str))
    print(text)
    if asked.save:
        file = RESULTS / f"{named}-{machine_name()}-{result['date']}.json"
        file.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}", file=sys.stderr)


def portable(text: str) -> str:
    """`text` with paths beside this checkout written relative to it: a result names no folder of one machine."""
    return text.replace(f"{ROOT.parent}/", "../")


def parse(
    name: str, about: str, options: Sequence[Option], *, parts: Sequence[str] = (), data: bool | None = False
) -> argparse.Namespace:
    """The arguments of a benchmark. `data`: whether it needs a folder of models and rows; None: some parts do."""
    parser = argparse.ArgumentParser(f"python -m {name}", description=about, formatter_class=_Help)
    if parts:
        parser.add_argument("part", choices=parts)
    if data is not False:
        parser.add_argument("--data", type=Path, required=bool(data), help="folder with models/, rows/, text/ ..")
    for option in options:
        flag = f"--{option.name.replace('_', '-')}"
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", help=option.help)
        elif isinstance(option.default, tuple):
            parser.add_argument(flag, type=lambda text: tuple(text.split(",")), help=option.help)
        else:
            parser.add_argument(flag, type=type(option.default), help=option.help)
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: only shows that it runs")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    defaults = {option.name: option.default for option in options}
    parser.set_defaults(**defaults)
    if parser.parse_args().tiny:
        parser.set_defaults(**{option.name: option.tiny for option in options if option.tiny is not None})
    return parser.parse_args()


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A docstring as it is written, and the default of each flag."""


def witness(name: str) -> dict[str, Any]:
    """What is said of every measurement: what ran, when, where, and on which versions."""
    from nybble.hardware import detect_device
    from nybble.training import software_versions

    return {
        "benchmark": name,
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": detect_device("cpu").name,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": software_versions(),
    }


def command_line() -> str:
    """The command that started this program, as one would type it."""
    spec = sys.modules["__main__"].__spec__
    program = f"-m {spec.name}" if spec else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])


def machine_name() -> str:
    """A short name for files: the processor's family and its cores, as in `epyc-2core`."""
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text() if cpu_info.is_file() else platform.processor()
    model = re.search(r"model name\s*:\s*(.*)", text)
    words = re.findall(r"epyc|xeon|ryzen|threadripper|core|apple", (model[1] if model else text).lower())
    return f"{words[0] if words else platform.machine()}-{os.cpu_count()}core"


# Time


def medians(
    sides: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, *, warm_up: bool = True, quiet: bool = False
) -> dict[str, Figures]:
    """Call the sides in turns; the median of each of their figures. With `warm_up` a first round is not counted."""
    seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in sides}
    for round_ in range(repeats + warm_up):
        for name in list(sides)[:: -1 if round_ % 2 else 1]:
            figures = sides[name]()
            if round_ or not warm_up:
                seen[name].append(figures)
                if not quiet:
                    print(f"{name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    return {name: {key: statistics.median(f[key] for f in every) for key in every[0]} for name, every in seen.items()}


def seconds(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Figures]:
    """Median wall and processor seconds of a call of each side, in turns."""
    return medians({name: timed(call) for name, call in sides.items()}, repeats, quiet=True)


def timed(call: Callable[[], object]) -> Callable[[], Figures]:
    """`call`, returning how long it took: by the clock, and in seconds of this thread's processor.

    Other programs on the machine lengthen the former and hardly the latter, which leaves out the work of other threads.
    """

    def measured() -> Figures:
        time.sleep(REST_SECONDS)
        wall, busy = time.perf_counter(), time.thread_time()
        call()
        return {"seconds": time.perf_counter() - wall, "processor_seconds": time.thread_time() - busy}

    return measured


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


# Memory and processes


def watch(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, dict[str, Any]]:
    """Run a command: its output; its seconds, processor seconds and peak bytes, with those of its children.

    Bytes are of anonymous memory, sampled: pages of mapped files belong to the system. Shared memory counts once.
    """
    began, computed, peak = time.monotonic(), processor_seconds(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(watched))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with exit code {process.returncode}")
    spent = {"seconds": time.monotonic() - began, "processor_seconds": processor_seconds() - computed}
    return output, {**spent, "peak_bytes": peak}


def anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous memory of a process and its children; 0 when it has just ended."""
    try:
        children = process.children(recursive=True)
    except psutil.Error:
        return 0
    if not children:
        return _kilobytes(Path(f"/proc/{process.pid}/status"), "RssAnon:")
    return sum(_kilobytes(Path(f"/proc/{p.pid}/smaps_rollup"), "Pss_Anon:") for p in (process, *children))


def _kilobytes(file: Path, field: str) -> int:
    """A field of a file of /proc, in bytes; 0 when the process has just ended."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


class ResidentPeak:
    """The highest resident memory of this process from here on, above what it holds now."""

    def __init__(self) -> None:
        self._bare = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes so far."""
        return _kilobytes(Path("/proc/self/status"), "VmHWM:") - self._bare


def fresh(
    module: str, function: str, *arguments: Any, processes: int = 1, environment: Mapping[str, str] | None = None
) -> Any:
    """The result of `module.function(*arguments)` in a process of its own, or in several under torchrun.

    Arguments and result travel as JSON; of several processes the first one's result is returned.
    """
    words = ["bench.harness", module, function, json.dumps(arguments, default=str)]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **threads, **(environment or {})},
    )
    if ended.returncode:
        raise SystemExit(f"{module}.{function} failed: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _fresh_main() -> None:
    """The process that `fresh` starts."""
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))


# Tables


def print_table(heads: str, rows: Iterable[Sequence[object]]) -> None:
    """Print Markdown; `heads` is the first line. Rows are printed as they come."""
    columns = heads.count("|") + 1
    print(f"| {heads} |\n{'|---' * columns}|", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    _fresh_main()
