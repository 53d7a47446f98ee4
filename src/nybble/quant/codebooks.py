"""The value tables of bitsandbytes' formats, as data.

NF4: the 16 values of Dettmers et al. 2023 (QLoRA, arXiv 2305.14314, appendix E), quantiles of N(0,1) scaled to [-1, 1]
with an exact zero. FP4: sign, two exponent bits, one mantissa bit, scaled to a largest value of 1; its code order is
not its value order. The 8-bit table (for the scales under double quantization) is the dynamic data type of Dettmers
2016 (arXiv 1511.04561): a sign, an exponent of base 10 given by leading zeros, a linear fraction.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Magnitudes of the codes 0..7 in units of the largest one, 12; codes 8..15 carry the sign bit.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@cache
def codebook(quant_type: str) -> Tensor:
    """Values of the 16 codes, `(16,) float32` on the CPU; do not write to it."""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    if quant_type == "fp4":
        positive = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device="cpu") / 12.0
        return torch.cat([positive, 0.0 - positive])  # code 8 is +0.0, as in bitsandbytes' table
    raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")


@cache
def dynamic_codebook() -> Tensor:
    """The signed 8-bit dynamic table, ascending, `(256,) float32` on the CPU; do not write to it.

    For exponent e = 0..6 there are 2**e fractions, the midpoints of equal steps over [0.1, 1], times 10**(e - 6),
    with both signs; then 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        fractions = (steps[:-1] + steps[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * fractions).tolist()
        values += (-scale * fractions).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")
