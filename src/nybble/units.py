"""The one place where numbers become text. Bytes inside, GB (1e9) or MB only where shown."""

from __future__ import annotations

import re


def format_bytes(n_bytes: float | None) -> str:
    """`3_342_000_000 -> "3.34 GB"`; decimal units, as disks and model sizes are given."""
    if n_bytes is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.2f} {unit}" if unit != "kB" else f"{n_bytes / size:.0f} {unit}"
    return f"{n_bytes:.0f} B"


_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """`"8GiB" -> 8_589_934_592`, `"7.5 GB"`, `"900M"`; a bare number is bytes.

    Raises:
        ValueError: anything else, or nothing above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _BYTES[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write e.g. 8GiB, 7.5GB or a number of bytes")
    return size


def format_seconds(seconds: float | None) -> str:
    """`3725 -> "1 h 02 min"`, `75 -> "1 min 15 s"`, `4.2 -> "4.2 s"`."""
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"


def format_count(n: float | None) -> str:
    """`4194304 -> "4,194,304"`."""
    return "–" if n is None else f"{n:,.0f}"


def format_number(x: float | None, digits: int = 4) -> str:
    """A figure with a fixed number of decimals, or a dash where there is none."""
    return "–" if x is None else f"{x:.{digits}f}"


def format_share(x: float | None) -> str:
    """`0.925 -> "92.5 %"`."""
    return "–" if x is None else f"{100 * x:.1f} %"
