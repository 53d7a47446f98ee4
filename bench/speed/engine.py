"""The 4-bit engine on a CPU: decode, encode, and x W^T of a few rows, beside the alternatives.

Decoding reads the packed bytes and writes the decoded ones; its speed is also given as a share of what a copy of as
many bytes reaches here. bitsandbytes and torchao are measured through their public functions, if they are installed.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Figures, Option, print_table, run, seconds
from nybble.kernels import library
from nybble.kernels.ops4bit import cpu
from nybble.kernels.ops4bit import torch as plain
from nybble.quant import PackedWeight, encode_searched

Sides = dict[str, Callable[[], object]]
ROWS = (1, 4, 8)
TORCH_PATH_ELEMENTS = 1 << 20  # encoded by the reference, which is slow


def on_threads(n: int, call: Callable[[], object]) -> Callable[[], object]:
    """`call` on n threads of torch, and of ours."""

    def with_threads() -> None:
        torch.set_num_threads(n)
        call()

    return with_threads


def on_one_and_all(name: str, threads: int, call: Callable[[], object]) -> Sides:
    """A side on one thread, and on all."""
    sides = {f"{name}, 1 thread": on_threads(1, call)}
    return sides | ({f"{name}, {threads} threads": on_threads(threads, call)} if threads > 1 else {})


def bitsandbytes_functions() -> Any:
    """The public functions of bitsandbytes; None if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    return importlib.import_module("bitsandbytes.functional")


def torchao_nf4() -> Any:
    """The module of torchao's NF4 tensor; None if there is none."""
    for name in ("torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def decode_speed(weight: PackedWeight, values: Tensor, threads: int, repeats: int) -> dict[str, Figures]:
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
    copied = next(iter(measured.values()))["seconds"]
    for figures in measured.values():
        taken = figures["seconds"]
        figures |= {"elements_per_second": weight.n_elements / taken, "bytes_per_second": moved / taken}
        figures["share_of_copy"] = copied / taken
    return measured


def encode_speed(values: Tensor, threads: int, repeats: int) -> dict[str, Figures]:
    """Encode from bfloat16 with double quantization; ours with searched scales, the others with absmax."""
    flat = values.reshape(-1)
    sides = on_one_and_all("torch path, search", threads, lambda: encode_searched(flat[:TORCH_PATH_ELEMENTS]))
    sides |= on_one_and_all("native, search", threads, lambda: encode_searched(flat, steps=cpu))
    if functional := bitsandbytes_functions():
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        sides |= on_one_and_all("bitsandbytes, absmax", threads, lambda: functional.quantize_4bit(values, **options))
    if module := torchao_nf4():
        sides["torchao, absmax"] = on_threads(threads, lambda: module.to_nf4(values, 64, 256))
    measured = seconds(sides, repeats)
    for name, figures in measured.items():
        count = min(flat.numel(), TORCH_PATH_ELEMENTS) if name.startswith("torch path") else flat.numel()
        figures["elements_per_second"] = count / figures["seconds"]
    return measured


def product_speed(weight: PackedWeight, values: Tensor, rows: int, threads: int, repeats: int) -> dict[str, Figures]:
    """x W^T in bfloat16. bitsandbytes reorders the bytes first, and rounds values and scales to bfloat16."""
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


def measure(asked: Namespace) -> dict[str, Any]:
    """The three operations."""
    if reason := library.unavailable():
        raise SystemExit(f"the native backend is not available: {reason}")
    torch.manual_seed(0)
    threads, n, repeats = torch.get_num_threads(), asked.size, asked.repeats
    values = torch.randn(n, n, dtype=torch.bfloat16)
    weight = encode_searched(values, steps=cpu)
    decode = decode_speed(weight, values, threads, repeats)
    encode = encode_speed(values, threads, max(2, repeats // 5))
    products = {rows: product_speed(weight, values, rows, threads, repeats) for rows in ROWS}
    print_table(
        f"decode {n} x {n} to bfloat16 | ms | G elements/s | GB/s | % of copy",
        (
            (
                name,
                f"{1000.0 * f['seconds']:.3g}",
                f"{1e-09 * f['elements_per_second']:.3g}",
                f"{1e-09 * f['bytes_per_second']:.3g}",
                f"{100 * f['share_of_copy']:.3g}",
            )
            for name, f in decode.items()
        ),
    )
    print_table(
        f"encode {n} x {n} | ms | M elements/s",
        ((s, f"{1e3 * f['seconds']:.3g}", f"{1e-6 * f['elements_per_second']:.3g}") for s, f in encode.items()),
    )
    print_table(
        f"x W^T, {n} x {n} | {' | '.join(f'ms, {rows} rows' for rows in ROWS)}",
        ((s, *(f"{1e3 * products[rows][s]['seconds']:.3g}" for rows in ROWS)) for s in products[ROWS[0]]),
    )
    about = {"threads": threads, "instruction_set": library.instruction_set(), "torchao": torchao_nf4() is not None}
    return {**about, "decode": decode, "encode": encode, "products": products}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("size", 4096, tiny=256, help="rows and columns of the weight"),
        Option("repeats", 15, tiny=2),
    )
