"""Measure how fast the device copies and multiplies, for the planner and to detect a slow backend."""

from __future__ import annotations

import torch

from nybble.diagnostics.measure import CheckOutcome, best_seconds, dtypes_of
from nybble.kernels import dequantize
from nybble.quant import PackedWeight


def bandwidth(device: torch.device, _path: str) -> CheckOutcome:
    """Measure the bytes per second that a copy reads and writes."""
    return CheckOutcome(figures={"bytes_per_second": _copied_bytes_per_second(device)})


def multiplication(device: torch.device, _path: str) -> CheckOutcome:
    """Measure the floating-point operations per second of a square product in each type."""
    rates = {str(t).removeprefix("torch."): products_per_second(device, t) for t in dtypes_of(device)}
    return CheckOutcome(figures={f"{name}_flops_per_second": rate for name, rate in rates.items()})


def speed_of_decoding(device: torch.device, _path: str) -> CheckOutcome:
    """Measure how many times longer decoding takes than copying as many bytes, with the chosen backend."""
    size = 8192 if device.type == "cuda" else 4096
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (size * size // 2, 1), dtype=torch.uint8, generator=generator)
    scales = torch.ones(size * size // 64)
    weight = PackedWeight(codes, scales, (size, size), 64, "nf4", torch.bfloat16).to(device)
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    seconds = best_seconds(lambda: dequantize(weight, torch.bfloat16, out), device)
    moved = weight.n_bytes + out.numel() * 2
    longer = seconds * _copied_bytes_per_second(device) / moved
    return CheckOutcome(longer, {"bytes_per_second": moved / seconds})


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The floating-point operations per second of a square product."""
    size = 8192 if device.type == "cuda" else 768
    # Random: GPUs multiply ones faster than weights.
    a = torch.empty(size, size, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(0))
    return 2 * size**3 / best_seconds(lambda: a @ a, device, 0.2)


def _copied_bytes_per_second(device: torch.device) -> float:
    n_bytes = (1 << 28) if device.type == "cuda" else (1 << 26)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / best_seconds(lambda: target.copy_(source), device, 0.2)
