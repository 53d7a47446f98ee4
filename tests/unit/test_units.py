"""Numbers as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.units import (
    exact_size,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
    parse_bytes,
)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (65_536, "66 kB"),
        (1_000_000, "1.00 MB"),
        (3_342_000_000, "3.34 GB"),
        (1_500_000_000_000, "1.50 TB"),
        (-2_000_000, "-2.00 MB"),
        (None, "–"),
    ],
)
def test_bytes_are_shown_in_decimal_units(n_bytes: float | None, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.2, "4.2 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (90_000, "25 h 00 min"),
        (None, "–"),
    ],
)
def test_seconds_are_shown_in_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (4_194_304, "4,194,304"), (1234.6, "1,235"), (None, "–")]
)
def test_counts_have_commas(n: float | None, text: str) -> None:
    assert format_count(n) == text


def test_figures_keep_their_decimals() -> None:
    assert [format_number(1.23456), format_number(2, 2), format_number(None)] == ["1.2346", "2.00", "–"]


def test_shares_are_percent() -> None:
    assert [format_share(0.925), format_share(0), format_share(1), format_share(None)] == [
        "92.5 %",
        "0.0 %",
        "100.0 %",
        "–",
    ]


@given(st.integers(1, 2**62), st.sampled_from([1, 2**20, 10**6]))
def test_an_exact_size_is_read_as_itself(n: int, unit: int) -> None:
    assert parse_bytes(exact_size(n * unit)) == n * unit
    assert parse_bytes(exact_size(n * unit), "GiB") == n * unit
