"""95 % confidence intervals of held-out metrics, over rows and, if there are several, over seeds.

A loss is a ratio of nats to tokens over a sample of rows, so its variance is that of a ratio estimator (Cochran,
Sampling Techniques, 3rd ed., 2.11): s^2 = n / (n - 1) * sum (x_i - R w_i)^2 / (sum w_i)^2. Two arms are evaluated on
the same rows, so their difference is computed row by row: what makes a row hard for both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the value cannot be distinguished from 0."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Sums:
    """A metric of one run, row by row: it is sum(totals) / sum(weights)."""

    totals: Sequence[float]
    weights: Sequence[float]

    def minus(self, other: Sums) -> Sums:
        """The difference row by row; both must cover the same rows in the same order."""
        pairs = zip(self.totals, other.totals, strict=True)
        return Sums([left - right for left, right in pairs], self.weights)


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.960 + 2.45 / degrees


def interval(seeds: Sequence[Sums]) -> Interval | None:
    """The mean over seeds of sum(totals) / sum(weights), with the noise of rows and of seeds; None below two rows.

    All seeds are evaluated on the same rows, so more seeds do not reduce the noise of the rows.
    """
    if not seeds or any(len(sums.totals) < 2 for sums in seeds):
        return None
    values = [math.fsum(sums.totals) / math.fsum(sums.weights) for sums in seeds]
    value = fmean(values)
    of_rows = fmean(_half_width(sums, own) ** 2 for sums, own in zip(seeds, values, strict=True))
    half = math.hypot(math.sqrt(of_rows), _noise_of_seeds(values))
    return Interval(value, value - half, value + half)


def share_interval(seeds: Sequence[Sequence[bool]]) -> Interval | None:
    """The share of rows that are right, by Wilson's interval, which says something where all or none are; None: no row.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927). The noise of several
    seeds is added.
    """
    if not seeds or any(not rows for rows in seeds):
        return None
    shares = [fmean(rows) for rows in seeds]
    share, n, z = fmean(shares), len(seeds[0]), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    noise = _noise_of_seeds(shares)
    low, high = share - math.hypot(share - middle + half, noise), share + math.hypot(middle + half - share, noise)
    return Interval(share, max(0.0, low), min(1.0, high))


def _noise_of_seeds(values: Sequence[float]) -> float:
    return student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _half_width(sums: Sums, ratio: float) -> float:
    n = len(sums.totals)
    squares = math.fsum((x - ratio * w) ** 2 for x, w in zip(sums.totals, sums.weights, strict=True))
    return student_t(n - 1) * math.sqrt(n / (n - 1) * squares) / math.fsum(sums.weights)
