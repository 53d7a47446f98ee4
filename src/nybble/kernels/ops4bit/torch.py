"""The backend in plain torch, the definition of correct: any device, nothing to build or compile.

Decoding gives the bits of `nybble.quant.decode` with fewer passes: one table look-up per byte yields two values, and
blocks are handled in pieces that stay in cache (60 ms against 318 ms for a 4096 x 4096 weight on two AVX-512 cores).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nybble.quant import PackedWeight, codebook, decode_absmax
from nybble.quant.feedback import descend, feed_back
from nybble.quant.search import nearest_codes, nested_codes, search_scales

__all__ = [
    "NAME",
    "LowRank",
    "dequantize",
    "descend",
    "feed_back",
    "most_rows",
    "multiply",
    "multiply_dense",
    "nearest_codes",
    "nested_codes",
    "search_scales",
]

NAME = "torch"
_PIECE = 1 << 20  # weights decoded at a time


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode `weight` into `out`, contiguous, of its shape."""
    block_size, flat = weight.block_size, out.view(-1)
    scales = decode_absmax(weight).unsqueeze(1)
    codes = weight.packed.reshape(-1)
    table = _pair_table(weight.quant_type).to(codes.device)
    full = flat.numel() // block_size
    step = max(1, _PIECE // block_size)
    for first in range(0, full, step):
        last = min(first + step, full)
        values = _pairs(table, codes[first * block_size // 2 : last * block_size // 2]).view(-1, block_size)
        flat[first * block_size : last * block_size].view(-1, block_size).copy_(values.mul_(scales[first:last]))
    rest = flat[full * block_size :]
    if rest.numel():  # a last, shorter block
        rest.copy_(_pairs(table, codes[full * block_size // 2 :])[: rest.numel()] * scales[-1])


def most_rows(dtype: torch.dtype, weight: PackedWeight) -> int:
    """None: `multiply` decodes the weight itself."""
    return 0


class LowRank(NamedTuple):
    """What an adapter adds to a weight: s B A."""

    a: Tensor  # (r, in_features), any type
    b: Tensor  # (out_features, r)
    scaling: float

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s (x A^T) B^T, in place and in the type of x."""
        return y.addmm_(x @ self.a.to(x.dtype).t(), self.b.to(x.dtype).t(), alpha=self.scaling)


def multiply(x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
    """x (W + s B A)^T by way of the decoded weight."""
    decoded = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    dequantize(weight, decoded)
    return multiply_dense(x, decoded, low_rank)


def multiply_dense(x: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """x (W + s B A)^T."""
    y = x @ weight.t()
    return y if low_rank is None else low_rank.added(y, x)


def _pairs(table: Tensor, codes: Tensor) -> Tensor:
    return torch.index_select(table, 0, codes.int()).view(torch.float32)


@cache
def _pair_table(quant_type: str) -> Tensor:
    """The two values of each byte, their 8 bytes seen as one float64 so that a look-up moves both: `(256,)`."""
    values = codebook(quant_type)
    byte = torch.arange(256, device="cpu")
    return torch.stack([values[byte >> 4], values[byte & 0xF]], dim=1).contiguous().view(torch.float64).view(-1)
