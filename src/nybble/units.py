"""Format numbers as text, and parse sizes. All code counts in bytes and seconds; only shown text has larger units."""

from __future__ import annotations

import re
from fractions import Fraction


def format_bytes(n_bytes: float | None) -> str:
    """Format a size in decimal units, as disks and models are sold: `3_342_000_000 -> "3.34 GB"`; None is a dash."""
    if n_bytes is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.2f} {unit}" if unit != "kB" else f"{n_bytes / size:.0f} {unit}"
    return f"{n_bytes:.0f} B"


_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_LEAST_BARE = 10**6  # a number without a unit below it is hardly bytes


class UnlikelySizeError(ValueError):
    """A number without a unit that somebody thought to be in GB or MB."""


def parse_bytes(text: str, bare_unit: str = "") -> int:
    """Parse a size such as `"8GiB"` (8_589_934_592 bytes), `"7.5 GB"` or `"900M"`; a bare number counts `bare_unit`.

    Raises:
        UnlikelySizeError: a number alone counts bytes and is too small for anything.
        ValueError: the text is anything else, or the size is not above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]i?)?(b?)", text.strip().lower())
    unit = "" if match is None else match[2] or ("" if match[3] else bare_unit.lower().removesuffix("b"))
    size = int(Fraction(match[1]) * _BYTES[unit]) if match else 0
    if match is None or size <= 0:
        raise ValueError(f"{text!r} is not an amount of memory; write one such as 8GiB, 7.5GB or a number of bytes")
    if size < _LEAST_BARE and not match[2] and not match[3] and not bare_unit:
        raise UnlikelySizeError(f"{size:,} bytes; write {size}{'GiB' if size < 1024 else 'MiB'} if that is meant")
    return size


def exact_size(n_bytes: int) -> str:
    """Format a size exactly: `8_589_934_592 -> "8GiB"`, `7_500_000_000 -> "7500MB"`; `parse_bytes` inverts it."""
    size, unit = max((size, unit) for unit, size in _BYTES.items() if n_bytes % size == 0)
    return f"{n_bytes // size}{unit[:1].upper()}{unit[1:]}B"


def format_seconds(seconds: float | None) -> str:
    """Format a duration: `3725 -> "1 h 02 min"`, `75 -> "1 min 15 s"`, `4.2 -> "4.2 s"`; None is a dash."""
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"


def format_count(n: float | None) -> str:
    """Format a count: `4194304 -> "4,194,304"`; None is a dash."""
    return "–" if n is None else f"{n:,.0f}"


def format_number(x: float | None, digits: int = 4) -> str:
    """Format a number with a fixed number of decimals; None is a dash."""
    return "–" if x is None else f"{x:.{digits}f}"


def format_share(x: float | None) -> str:
    """Format a fraction in percent: `0.925 -> "92.5 %"`; None is a dash."""
    return "–" if x is None else f"{100 * x:.1f} %"
