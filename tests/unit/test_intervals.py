"""Intervals, against figures worked by hand, numerical integration and draws whose truth is known."""

from __future__ import annotations

import math
import random

import pytest

from nybble.intervals import Interval, Sums, interval, share_interval, student_t


def within(degrees: int, t: float) -> float:
    """P(|T| < t), by integrating Student's density."""
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    n = 20_000
    width = 2 * t / n
    places = (-t + (i + 0.5) * width for i in range(n))
    return sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in places) * width


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 60, 200])
def test_the_quantile_holds_95_percent(degrees: int) -> None:
    assert within(degrees, student_t(degrees)) == pytest.approx(0.95, abs=2e-4)


def test_an_interval_worked_by_hand() -> None:
    # R = 12 / 6 = 2; residuals -1, 0, 1; s^2 = 3 / 2 * 2 / 36; t(2) = 4.303.
    found = interval([Sums([1, 4, 7], [1, 2, 3])])
    half = 4.303 * math.sqrt(3 / 36)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))


def test_seeds_add_their_own_noise() -> None:
    one = interval([Sums([1, 4, 7], [1, 2, 3])])
    both = interval([Sums([1, 4, 7], [1, 2, 3]), Sums([2, 5, 8], [1, 2, 3])])  # 2.0 and 2.5: t(1) * sd / sqrt(2)
    assert one is not None
    assert both is not None
    of_seeds = 12.706 * 0.25
    of_rows = (
        4.303**2 * (3 / 36 + 1.5 * 1.5 / 36) / 2
    )  # residuals of the second: -0.5, 0, 0.5, twice the first's weight
    assert both.value == pytest.approx(2.25)
    assert both.high - both.value > of_seeds
    assert both.high - both.value < math.sqrt(of_seeds**2 + 2 * of_rows)
    assert both.high - both.low > one.high - one.low


def test_of_one_row_nothing_can_be_said() -> None:
    assert interval([Sums([1.0], [1])]) is None
    assert interval([]) is None


def test_a_share_worked_by_hand() -> None:
    # Wilson: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96.
    found = share_interval([[True] * 8 + [False] * 2])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share_interval([]) is None
    assert share_interval([[]]) is None


@pytest.mark.parametrize("right", [True, False])
def test_a_share_of_all_or_none_is_not_certain(right: bool) -> None:
    few, many = share_interval([[right] * 6]), share_interval([[right] * 600])
    assert few is not None
    assert many is not None
    assert few.value == many.value == float(right)
    assert few.high - few.low == pytest.approx(0.39, abs=0.01)
    assert many.high - many.low < 0.01
    noisy = share_interval([[True] * 4, [True, True, True, False], [True, True, False, False]])
    assert noisy is not None
    calm = share_interval([[True, True, True, False]])
    assert calm is not None
    assert noisy.value == calm.value
    assert noisy.low < calm.low


def test_a_difference_over_the_same_rows_is_surer_than_two_intervals() -> None:
    draw = random.Random(1)
    hard = [draw.gauss(3, 1) for _ in range(100)]
    a = Sums([x + draw.gauss(0, 0.01) for x in hard], [1.0] * 100)
    b = Sums([x + 0.05 + draw.gauss(0, 0.01) for x in hard], [1.0] * 100)
    apart = interval([b.minus(a)])
    alone = interval([a])
    assert apart is not None
    assert alone is not None
    assert not apart.within_noise
    assert apart.value == pytest.approx(0.05, abs=0.01)
    assert alone.high - alone.low > 10 * (apart.high - apart.low)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(7)
    hits = 0
    for _ in range(1000):
        weights = [draw.randint(5, 50) for _ in range(40)]
        found = interval([Sums([w * draw.gauss(2, 0.5) for w in weights], weights)])
        assert found is not None
        hits += found.low <= 2 <= found.high
    assert 0.925 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(("low", "high", "noise"), [(-0.1, 0.1, True), (0.0, 0.1, True), (0.01, 0.1, False)])
def test_within_noise_means_that_zero_is_inside(low: float, high: float, noise: bool) -> None:
    assert Interval(0.05, low, high).within_noise is noise
