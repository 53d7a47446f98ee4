"""Speed of the 4-bit engine on a CPU: decode, encode, and x W^T of a few rows, beside the alternatives.

Sides are alternated within one run and medians are shown. Decoding moves the packed bytes in and the decoded ones out;
its speed is also given as a share of what a copy of as many bytes reaches here. bitsandbytes and torchao are measured
through their public functions, if they are installed. Prints a table per operation and one JSON object last.

    python -m bench.speed.engine [--size 4096] [--repeats 15]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from nybble.hardware import detect_device
from nybble.kernels import cpu, plain
from nybble.quant import PackedWeight, encode_searched
from nybble.training import software_versions

Sides = dict[str, Callable[[], object]]
ROWS = (1, 4, 8)
REST_SECONDS = (
    0.02  # before each call: OpenMP's threads spin for a while after their work and take the next side's core
)


def seconds(sides: Sides, repeats: int) -> dict[str, float]:
    """Median seconds of each side, one call of each in turn; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, call in sides.items():
            time.sleep(REST_SECONDS)
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return {name: median(times[1:]) for name, times in taken.items()}


def on_threads(n: int, call: Callable[[], object]) -> Callable[[], object]:
    """`call` on n threads of torch, and of ours."""

    def run() -> None:
        torch.set_num_threads(n)
        call()

    return run


def on_one_and_all(name: str, threads: int, call: Callable[[], object]) -> Sides:
    """A side on one thread, and on all."""
    sides = {f"{name}, 1 thread": on_threads(1, call)}
    return sides | ({f"{name}, {threads} threads": on_threads(threads, call)} if threads > 1 else {})


def bitsandbytes_functions() -> object | None:
    """The public functions of bitsandbytes, None if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    return importlib.import_module("bitsandbytes.functional")


def torchao_nf4() -> object | None:
    """The module of torchao's NF4 tensor, None if there is none."""
    for name in ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def decode_speed(weight: PackedWeight, values: Tensor, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Decode to bfloat16, into a reused buffer where a side can."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    moved = weight.n_bytes + out.numel() * out.element_size()
    source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)
    sides: Sides = {"copy of as many bytes, 1 thread": on_threads(1, lambda: target.copy_(source))}
    sides |= on_one_and_all("torch path", threads, lambda: plain.dequantize(weight, out))
    sides |= on_one_and_all("native", threads, lambda: cpu.dequantize(weight, out))
    sides["native, new buffer"] = on_threads(1, lambda: cpu.dequantize(weight, torch.empty_like(out)))
    if functional := bitsandbytes_functions():
        packed, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
        sides |= on_one_and_all("bitsandbytes", threads, lambda: functional.dequantize_4bit(packed, state))
    if module := torchao_nf4():
        tensor = module.to_nf4(values, 64, 256)
        sides["torchao"] = on_threads(threads, tensor.get_original_weight)
    measured = seconds(sides, repeats)
    copied = next(iter(measured.values()))
    return {
        name: {
            "seconds": taken,
            "elements_per_second": weight.n_elements / taken,
            "bytes_per_second": moved / taken,
            "share_of_copy": copied / taken,
        }
        for name, taken in measured.items()
    }


def encode_speed(values: Tensor, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Encode from bfloat16 with double quantization; ours with searched scales, the others with absmax."""
    flat = values.reshape(-1)
    sides = on_one_and_all("torch path, search", threads, lambda: encode_searched(flat[: 1 << 20]))
    sides |= on_one_and_all("native, search", threads, lambda: encode_searched(flat, steps=cpu))
    if functional := bitsandbytes_functions():
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        sides |= on_one_and_all("bitsandbytes, absmax", threads, lambda: functional.quantize_4bit(values, **options))
    if module := torchao_nf4():
        sides["torchao, absmax"] = on_threads(threads, lambda: module.to_nf4(values, 64, 256))
    measured = seconds(sides, repeats)
    counts = {name: min(flat.numel(), 1 << 20) if name.startswith("torch path") else flat.numel() for name in measured}
    return {name: {"seconds": t, "elements_per_second": counts[name] / t} for name, t in measured.items()}


def product_speed(weight: PackedWeight, values: Tensor, rows: int, threads: int, repeats: int) -> dict[str, float]:
    """Seconds of x W^T in bfloat16. bitsandbytes reorders the bytes first, rounds values and scales to bfloat16."""
    x, dense = torch.randn(rows, weight.shape[1], dtype=torch.bfloat16), values.t()
    sides = on_one_and_all("16-bit weight", threads, lambda: x @ dense)
    sides |= on_one_and_all("torch path", threads, lambda: plain.multiply(x, weight))
    sides |= on_one_and_all("native", threads, lambda: cpu.multiply(x, weight))
    functional = bitsandbytes_functions()
    if functional and "gemv_4bit" in dir(functional) and torch.backends.cpu.get_cpu_capability() == "AVX512":
        packed, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=False)
        reordered, state = functional._convert_weight_packed_for_cpu(packed, state)
        sides |= on_one_and_all("bitsandbytes", threads, lambda: functional.gemv_4bit(x, reordered, state=state))
    return seconds(sides, repeats)


def show(title: str, table: dict[str, dict[str, float]], units: dict[str, tuple[str, float]]) -> None:
    """One row per side."""
    print(f"\n{title:<36}" + "".join(f"{unit:>14}" for unit, _ in units.values()))
    for name, row in table.items():
        print(f"{name:<36}" + "".join(f"{row[key] * scale:>14.4g}" for key, (_, scale) in units.items()))


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if reason := cpu.unavailable():
        raise SystemExit(f"the native path is not there: {reason}")
    torch.manual_seed(0)
    threads, n, repeats = torch.get_num_threads(), arguments.size, arguments.repeats
    values = torch.randn(n, n, dtype=torch.bfloat16)
    weight = encode_searched(values, steps=cpu)
    decode, encode = decode_speed(weight, values, threads, repeats), encode_speed(values, threads, max(3, repeats // 5))
    products = {rows: product_speed(weight, values, rows, threads, repeats) for rows in ROWS}
    by_side = {name: {str(rows): products[rows][name] for rows in ROWS} for name in products[ROWS[0]]}
    elements = ("G elements/s", 1e-9)
    show(
        f"decode {n} x {n} to bfloat16",
        decode,
        {
            "seconds": ("ms", 1e3),
            "elements_per_second": elements,
            "bytes_per_second": ("GB/s", 1e-9),
            "share_of_copy": ("% of copy", 1e2),
        },
    )
    show(f"encode {n} x {n}", encode, {"seconds": ("ms", 1e3), "elements_per_second": ("M elements/s", 1e-6)})
    show(f"x W^T, {n} x {n}", by_side, {str(rows): (f"ms, {rows} rows", 1e3) for rows in ROWS})
    if torchao_nf4() is None:
        print("\ntorchao: absent")
    result = {"size": n, "threads": threads, "instruction_set": cpu.instruction_set(), "decode": decode}
    result |= {"encode": encode, "product_seconds": by_side, "torchao": torchao_nf4() is not None}
    result |= {"device": detect_device("cpu").name, "versions": software_versions()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
