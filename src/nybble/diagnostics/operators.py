"""Check each backend of the 4-bit operators against the definition of the format, computed here in float64.

The tables are derived here from their definitions (quantiles of the normal distribution; sign, exponent and fraction),
so that a wrong table in the engine is detected too.
"""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import torch
from torch import Tensor

from nybble.diagnostics.measure import CheckOutcome, UnavailableError, apart, normal
from nybble.kernels import dispatcher
from nybble.kernels.ops4bit.backend import Ops4bitBackend
from nybble.quant import NESTED_BLOCK_SIZE, PackedWeight, encode, encode_searched

_GUARD = 64
_GUARDED = 7.0


def decoding(device: torch.device, path: str) -> CheckOutcome:
    """Check decoding: odd and even sizes, both 4-bit types, plain and nested scales, and every output type."""
    code = _code_of("dequantize_4bit", path, device)
    worst = 0.0
    shapes = ((37, 53), (96, 160), (1, 8193))
    for seed, (shape, quant_type, nested) in enumerate(product(shapes, ("nf4", "fp4"), (False, True))):
        weight = encode(normal(*shape, seed=seed), quant_type, 64 << seed % 3, nested)
        reference = decode_exactly(weight)
        on_device = weight.to(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            buffer = torch.full((weight.n_elements + 2 * _GUARD,), _GUARDED, dtype=dtype, device=device)
            out = buffer[_GUARD:-_GUARD].view(shape)
            code.dequantize(on_device, out)
            is_intact = bool((buffer[:_GUARD] == _GUARDED).all() and (buffer[-_GUARD:] == _GUARDED).all())
            worst = max(worst, apart(out, reference) if is_intact else math.inf)
    return CheckOutcome(worst)


def product_of_few_rows(device: torch.device, path: str) -> CheckOutcome:
    """Check x W^T for 1, 3 and 8 rows, with widths that do and do not fill whole words."""
    code = _code_of("gemv_4bit", path, device)
    worst = 0.0
    for seed, (rows, k) in enumerate(product((1, 3, 8), (256, 250))):
        weight = encode(normal(75, k, seed=seed))
        exact = decode_exactly(weight)
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(rows, k, seed=seed + 100, dtype=dtype)
            worst = max(worst, apart(code.multiply(x.to(device), weight.to(device)), x.double() @ exact.t()))
    return CheckOutcome(worst)


def encoding(device: torch.device, path: str) -> CheckOutcome:
    """Check the scale search: every code is the nearest to its weight, and the result is no worse than with absmax.

    The error is the largest distance beyond the nearest value, as a share of the block's scale.
    """
    code = _code_of("quantize_4bit", path, device)
    worst = 0.0
    cases = ((torch.float32, "nf4"), (torch.bfloat16, "nf4"), (torch.float16, "fp4"))
    for seed, (dtype, quant_type) in enumerate(cases):
        weight = normal(41, 77, seed=seed, dtype=dtype)
        made = encode_searched(weight.to(device), quant_type, 64, True, True, code).to("cpu")
        flat, scales = weight.double().view(-1), scales_exactly(made).repeat_interleave(64)[: weight.numel()]
        nearest = (flat[:, None] - _table(quant_type)[None, :] * scales[:, None]).abs().amin(dim=1)
        distance = (flat - decode_exactly(made).view(-1)).abs()
        beyond = ((distance - nearest) / scales.abs().clamp(min=1e-30)).max().item()
        searched, usual = _squares(made, flat), _squares(encode(weight, quant_type), flat)
        worst = max(worst, beyond if searched <= usual else math.inf) if math.isfinite(beyond) else math.inf
    return CheckOutcome(worst)


def decode_exactly(weight: PackedWeight) -> Tensor:
    """The weight in float64 on the CPU, from the definition of its tables."""
    byte = weight.packed.cpu().view(-1)
    codes = torch.stack([byte >> 4, byte & 15], dim=1).view(-1)[: weight.n_elements].long()
    scales = scales_exactly(weight).repeat_interleave(weight.block_size)[: weight.n_elements]
    return (_table(weight.quant_type)[codes] * scales).view(weight.shape)


def scales_exactly(weight: PackedWeight) -> Tensor:
    """The scales of the blocks, `(n_blocks,) float64` on the CPU."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax.cpu().double()
    steps = weight.nested_absmax.cpu().double().repeat_interleave(NESTED_BLOCK_SIZE)[: weight.n_blocks]
    codes = weight.absmax.cpu().view(-1).long()
    return torch.tensor(dynamic_values(), dtype=torch.float64)[codes] * steps + weight.nested_offset.cpu().double()


def nf4_values() -> list[float]:
    """The 16 NF4 values: quantiles of N(0, 1) divided by the largest; 8 steps up from 1/2 and 7 down, evenly spaced."""
    inverse = NormalDist().inv_cdf
    end = 1 - (1 / 32 + 1 / 30) / 2
    up = [inverse(0.5 + (end - 0.5) * i / 8) for i in range(1, 9)]
    down = [-inverse(0.5 + (end - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [value / up[-1] for value in (*down, 0.0, *up)]


def fp4_values() -> list[float]:
    """The 16 FP4 values: a sign, two bits of exponent and one of fraction, scaled so that the largest is 1."""
    positive = [0.0, 0.0625, *(2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1))]
    return [sign * value / 12 for sign in (1, -1) for value in positive]


def dynamic_values() -> list[float]:
    """The 8-bit table of nested scales: a sign, a power of ten and a linear fraction; also 0 and 1."""
    sized = [(0.1 + 0.9 * (i + 0.5) / 2**e) * 10.0 ** (e - 6) for e in range(7) for i in range(2**e)]
    return sorted([0.0, 1.0, *sized, *(-value for value in sized)])


def _table(quant_type: str) -> Tensor:
    return torch.tensor(nf4_values() if quant_type == "nf4" else fp4_values(), dtype=torch.float64)


def _squares(weight: PackedWeight, flat: Tensor) -> float:
    return (decode_exactly(weight).view(-1) - flat).square().sum().item()


def _code_of(operator: str, name: str, device: torch.device) -> Ops4bitBackend:
    (backend,) = dispatcher.named(operator, name, device)
    why_not = backend.unavailable()
    if why_not:
        raise UnavailableError(why_not)
    code: Ops4bitBackend = backend.load()
    return code
