"""`nybble recipes`."""

from __future__ import annotations

from nybble import bundled


def recipes() -> None:
    """List the recipes that come with Nybble; train, plan and the other verbs take them by name."""
    for name, file in bundled.recipes().items():
        first, *_ = file.read_text(encoding="utf-8").splitlines()
        print(f"{name:<20} {first.lstrip('# ').partition('. ')[0]}")
