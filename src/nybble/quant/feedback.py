"""Codes whose errors compensate each other, calibrated on the real inputs of a layer.

With inputs x of second moments H = E[x x^T] a layer's squared output error is tr(D H D^T), D = W - Q. Scales are those
of `nybble.quant.search`, fixed first (nested and decoded, so that double quantization costs nothing), then

1. columns are rounded one after another, the most active first, and each error is spread over the columns that have
   not been rounded yet (GPTQ, Frantar et al. 2022, arXiv 2210.17323, on the NF4 grid);
2. all columns are visited again `SWEEPS` times: each takes the grid value that is best given all others
   (coordinate descent: the error can only fall).

A row of the weight for which this is not better than nearest rounding uses nearest rounding. The number of bytes and
the decoder are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nybble.quant import search
from nybble.quant.blockwise import decode, decode_absmax
from nybble.quant.codebooks import codebook
from nybble.quant.packed import PackedWeight

DAMPING = 0.01  # share of the mean moment that is added to the diagonal, so that rare inputs do not dominate
SWEEPS = 2
_COLUMNS = 128  # columns that are rounded before their errors are spread by one matrix product


def encode_calibrated(
    weight: Tensor,  # (out_features, in_features) float32, float16 or bfloat16
    moments: Tensor,  # (in_features, in_features) float32, mean of x x^T
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    signed: bool = True,
    steps: search.Steps | None = None,
) -> PackedWeight:
    """Quantize a weight to 4 bits with error feedback.

    Raises:
        ValueError: the block size or type is not supported, the weight is not finite, or the moments have another size.
    """
    if moments.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not go with moments {tuple(moments.shape)}")
    start = search.encode_searched(weight, quant_type, block_size, double_quant, signed, steps)
    damped = damp(moments)
    if damped is None:
        return start
    scales = decode_absmax(start)
    grid = _Grid(quant_type, scales.repeat_interleave(block_size)[: weight.numel()].view(weight.shape).t().contiguous())
    wanted = weight.detach().float().t().contiguous()
    chosen = _sweep(wanted, _feed_back(wanted, damped, grid), damped, grid)
    nearest = decode(start, torch.float32).t()
    worse = _loss(wanted - chosen, damped) > _loss(wanted - nearest, damped)
    values = torch.where(worse, nearest, chosen).t().reshape(-1)
    loops = steps or search.TORCH_STEPS
    return replace(start, packed=loops.nearest_codes(values, quant_type, block_size, scales).unsqueeze(1))


def damp(moments: Tensor) -> Tensor | None:
    """Moments that are positive definite, `(in, in) float32`; None if all are zero or any is not finite."""
    mean = moments.diagonal().mean()
    if not torch.isfinite(moments).all() or mean <= 0:
        return None
    for strength in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = moments + strength * mean * torch.eye(len(moments), device=moments.device)
        if torch.linalg.cholesky_ex(damped).info == 0:
            return damped
    return None


class _Grid:
    """The values that each weight may have; all tensors here are transposed, `(in, out)`."""

    def __init__(self, quant_type: str, scales: Tensor) -> None:
        self.values = codebook(quant_type).sort().values.to(scales.device)
        self.midpoints = (self.values[:-1] + self.values[1:]) / 2
        self.scales = scales
        self.inverse = 1.0 / torch.where(scales.abs() < search.TINY, torch.full_like(scales, search.TINY), scales)

    def round(self, column: int, wanted: Tensor) -> Tensor:
        """The nearest values of a column."""
        rank = torch.bucketize(wanted * self.inverse[column], self.midpoints)
        return self.values[rank] * self.scales[column]


def _feed_back(weight: Tensor, moments: Tensor, grid: _Grid) -> Tensor:
    order = torch.argsort(moments.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight[order]
    chosen = torch.empty_like(weight)
    columns = order.tolist()
    for first in range(0, len(columns), _COLUMNS):
        last = min(first + _COLUMNS, len(columns))
        errors = torch.empty_like(left[first:last])
        for i in range(first, last):
            value = grid.round(columns[i], left[i])
            chosen[columns[i]] = value
            errors[i - first] = (left[i] - value) / upper[i, i]
            left[i:last] -= upper[i, i:last].unsqueeze(1) * errors[i - first]
        left[last:] -= upper[first:last, last:].t() @ errors
    return chosen


def _sweep(weight: Tensor, chosen: Tensor, moments: Tensor, grid: _Grid) -> Tensor:
    pull = moments @ (weight - chosen)
    for _ in range(SWEEPS):
        for first in range(0, len(weight), _COLUMNS):
            last = min(first + _COLUMNS, len(weight))
            moved = torch.empty_like(weight[first:last])
            for i in range(first, last):
                value = grid.round(i, chosen[i] + pull[i] / moments[i, i])
                moved[i - first] = chosen[i] - value
                chosen[i] = value
                pull[first:last] += moments[first:last, i].unsqueeze(1) * moved[i - first]
            pull[:first] += moments[:first, first:last] @ moved
            pull[last:] += moments[last:, first:last] @ moved
    return chosen


def _loss(difference: Tensor, moments: Tensor) -> Tensor:
    """Squared output error of each output, `(out,)`."""
    return (difference * (moments @ difference)).sum(dim=0)
