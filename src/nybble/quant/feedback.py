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

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nybble.quant import search
from nybble.quant.blockwise import decode, decode_absmax
from nybble.quant.codebooks import codebook
from nybble.quant.packed import PackedWeight

DAMPING = 0.01  # share of the mean moment that is added to the diagonal, so that rare inputs do not dominate
SWEEPS = 2
_COLUMNS = 128  # columns that are rounded before their errors are spread by one matrix product


class CalibrationSteps(search.Steps, Protocol):
    """The loops over all weights, those of error feedback too: `TORCH_STEPS` is one implementation."""

    def feed_back(self, left: Tensor, upper: Tensor, scales: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
        """Do what the function `feed_back` of this module does."""

    def descend(self, chosen: Tensor, pull: Tensor, moments: Tensor, scales: Tensor, quant_type: str) -> Tensor:
        """Do what the function `descend` of this module does."""


@dataclass(frozen=True)
class Factors:
    """Second moments of inputs, factorised once for all the weights that receive these inputs."""

    damped: Tensor  # positive definite, (in, in) float32
    order: Tensor  # columns, the most active first
    upper: Tensor  # U with U^T U the inverse of the damped moments in that order


def factorise(moments: Tensor) -> Factors | None:
    """The factors of `(in, in) float32` moments; None if all are zero or any is not finite."""
    mean = moments.diagonal().mean()
    if not torch.isfinite(moments).all() or mean <= 0:
        return None
    order = torch.argsort(moments.diagonal(), descending=True)
    for strength in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = moments + strength * mean * torch.eye(len(moments), device=moments.device)
        backwards = order.flip(0)
        root, failed = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
        if not failed:
            # Flipped, the root is an upper R with R R^T the damped moments in order: U is its inverse.
            return Factors(damped, order, _inverse_of_upper(root.flip(0, 1)).contiguous())
    return None


def _inverse_of_upper(matrix: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, mostly by products: LAPACK's solver takes three times as long."""
    n = len(matrix)
    if n <= 2 * _COLUMNS:
        one = torch.eye(n, device=matrix.device)
        solved: Tensor = torch.linalg.solve_triangular(matrix, one, upper=True)
        return solved
    half = n // 2
    inverse = matrix.new_zeros(n, n)
    inverse[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (matrix[:half, half:] @ inverse[half:, half:])
    return inverse


def encode_calibrated(
    weight: Tensor,  # (out_features, in_features) float32, float16 or bfloat16
    moments: Tensor | Factors | None,  # (in_features, in_features) float32, mean of x x^T; or their factors
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    signed: bool = True,
    steps: CalibrationSteps | None = None,  # default: TORCH_STEPS
) -> PackedWeight:
    """Quantize a weight to 4 bits so that the outputs of its layer change least.

    Without usable moments codes are the nearest.

    Raises:
        ValueError: the block size or type is not supported, the weight is not finite, or the moments have another size.
    """
    size = None if moments is None else tuple((moments.damped if isinstance(moments, Factors) else moments).shape)
    if size is not None and size != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not go with moments {size}")
    loops = steps or TORCH_STEPS
    start = search.encode_searched(weight, quant_type, block_size, double_quant, signed, loops)
    factors = factorise(moments) if isinstance(moments, Tensor) else moments
    if factors is None:
        return start
    scales = decode_absmax(start)
    # Transposed, as all below: the outputs of a column lie side by side.
    grid = scales.repeat_interleave(block_size)[: weight.numel()].view(weight.shape).t().contiguous()
    wanted = weight.detach().float().t().contiguous()
    chosen = _round_with_feedback(wanted, factors, grid, quant_type, loops)
    pull = factors.damped @ (wanted - chosen)
    for _ in range(SWEEPS):
        _sweep(chosen, pull, factors.damped, grid, quant_type, loops)
    nearest = decode(start, torch.float32).t()
    missed = wanted - nearest
    worse = ((wanted - chosen) * pull).sum(dim=0) > (missed * (factors.damped @ missed)).sum(dim=0)
    values = torch.where(worse, nearest, chosen).t().reshape(-1)
    return replace(start, packed=loops.nearest_codes(values, quant_type, block_size, scales).unsqueeze(1))


def feed_back(left: Tensor, upper: Tensor, scales: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Round columns one after another, and spread the error of each over those behind it.

    Args:
        left: the columns, `(n, out) float32`; what is left of them is written to it.
        upper: their part of U, `(n, n) float32`.
        scales: of each weight, `(n, out) float32`.
        quant_type: "nf4" or "fp4".

    Returns:
        The values that were chosen and the errors to spread over further columns, both `(n, out) float32`.
    """
    nearest = _Grid(quant_type, scales).nearest
    chosen = torch.empty_like(left)
    errors = torch.empty_like(left)
    for i in range(len(left)):
        chosen[i] = nearest(i, left[i])
        errors[i] = (left[i] - chosen[i]) / upper[i, i]
        left[i + 1 :] -= upper[i, i + 1 :].unsqueeze(1) * errors[i]
    return chosen, errors


def descend(chosen: Tensor, pull: Tensor, moments: Tensor, scales: Tensor, quant_type: str) -> Tensor:
    """Give each column in turn the values that are best given all others.

    Args:
        chosen: the columns' values, `(n, out) float32`; changed in place.
        pull: moments times what the values miss, `(n, out) float32`; kept up to date for these columns.
        moments: of these columns, `(n, n) float32`.
        scales: of each weight, `(n, out) float32`.
        quant_type: "nf4" or "fp4".

    Returns:
        By how much the values became smaller, `(n, out) float32`.
    """
    nearest = _Grid(quant_type, scales).nearest
    moved = torch.empty_like(chosen)
    for i in range(len(chosen)):
        value = nearest(i, chosen[i] + pull[i] / moments[i, i])
        moved[i] = chosen[i] - value
        chosen[i] = value
        pull += moments[:, i].unsqueeze(1) * moved[i]
    return moved


class _Grid:
    """The values that each weight may have."""

    def __init__(self, quant_type: str, scales: Tensor) -> None:
        self._values = codebook(quant_type).sort().values.to(scales.device)
        self._midpoints = (self._values[:-1] + self._values[1:]) / 2
        self._scales = scales
        self._inverse = 1.0 / torch.where(scales.abs() < search.TINY, torch.full_like(scales, search.TINY), scales)

    def nearest(self, column: int, wanted: Tensor) -> Tensor:
        """The nearest values of a column."""
        rank = torch.bucketize(wanted * self._inverse[column], self._midpoints)
        return self._values[rank] * self._scales[column]


class TorchSteps(search.TorchSteps):
    """All loops in plain torch."""

    feed_back = staticmethod(feed_back)
    descend = staticmethod(descend)


TORCH_STEPS: CalibrationSteps = TorchSteps()


def _round_with_feedback(
    weight: Tensor, factors: Factors, scales: Tensor, quant_type: str, loops: CalibrationSteps
) -> Tensor:
    order, upper = factors.order, factors.upper
    left, scales = weight[order], scales[order]
    chosen = torch.empty_like(weight)
    for first in range(0, len(order), _COLUMNS):
        own = slice(first, first + _COLUMNS)
        values, errors = loops.feed_back(left[own], upper[own, own], scales[own], quant_type)
        chosen[order[own]] = values
        left[own.stop :] -= upper[own, own.stop :].t() @ errors
    return chosen


def _sweep(
    chosen: Tensor, pull: Tensor, moments: Tensor, scales: Tensor, quant_type: str, loops: CalibrationSteps
) -> None:
    for first in range(0, len(chosen), _COLUMNS):
        own = slice(first, first + _COLUMNS)
        moved = loops.descend(chosen[own], pull[own], moments[own, own], scales[own], quant_type)
        pull[:first] += moments[:first, own] @ moved
        pull[own.stop :] += moments[own.stop :, own] @ moved
