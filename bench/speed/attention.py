"""Speed of attention over documents on a CPU, forward and backward, path beside path, and a product of matrices.

Paths are called in turn and medians are shown. One thread is timed in seconds of its processor, which other programs
on the machine do not lengthen; several are timed by the clock. Floating-point operations are counted for the pairs of
tokens that see each other: 2 products forward and 5 backward. Prints a table and one JSON object last.

    python -m bench.speed.attention [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from nybble.hardware import detect_device
from nybble.kernels.attention_paths import ladder
from nybble.kernels.plain_attention import Settings
from nybble.training import software_versions

BATCH = (128, 460, 460, 667)  # tokens of four rows
CASES = (  # documents, heads, kv_heads, width
    (BATCH, 16, 16, 64),
    (BATCH, 32, 8, 128),
    ((64,) * 32, 16, 16, 64),
    ((2048,), 16, 4, 64),
)


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, one call of each in turn; the first round is not counted."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, call in sides.items():
            time.sleep(0.02)  # OpenMP's threads spin for a while after their work
            started = clock()
            call()
            taken[name].append(clock() - started)
    return {name: median(times[1:]) for name, times in taken.items()}


def measure(lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, repeats: int) -> dict[str, object]:
    """Seconds of each path, and operations a second."""
    tokens = sum(lengths)
    q, k, v, grad = (torch.randn(tokens, n, width).bfloat16() for n in (heads, kv_heads, kv_heads, heads))
    settings, square = Settings(lengths, width**-0.5), torch.randn(1024, 1024).bfloat16()
    sides: dict[str, Callable[[], object]] = {
        path.NAME: lambda path=path: path.derive((q, k, v), grad, settings) for path in ladder("cpu")
    }
    seconds = medians(sides | {"matmul": lambda: square @ square}, repeats)
    operations = dict.fromkeys(seconds, 7 * 2 * width * heads * sum(n * (n + 1) // 2 for n in lengths))
    operations["matmul"] = 2 * 1024**3
    return {
        "threads": torch.get_num_threads(),
        "lengths": list(lengths),
        "heads": heads,
        "kv_heads": kv_heads,
        "width": width,
        "seconds": seconds,
        "operations_per_second": {name: operations[name] / taken for name, taken in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    found = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for case in CASES:
            result = measure(*case, repeats)
            found.append(result)
            speeds = result["operations_per_second"]
            assert isinstance(speeds, dict)
            shown = ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s" for name, speed in speeds.items())
            lengths, *shape = case
            print(f"{threads} threads, {len(lengths)} documents of {lengths[0]} to {lengths[-1]}, {shape}: {shown}")
    print(json.dumps({"cases": found, "device": detect_device("cpu").name, "versions": software_versions()}))


if __name__ == "__main__":
    main()
