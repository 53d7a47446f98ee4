"""`nybble recipes`."""

from __future__ import annotations

from nybble import bundled


def recipes() -> None:
    """List the recipes that can be given by name."""
    for name, file in bundled.recipes().items():
        first, *_ = file.read_text(encoding="utf-8").splitlines()
        print(f"{name:<20} {first.lstrip('# ').partition('. ')[0]}")
