"""The ranges of versions: capped where more than the public surface is used, and tested at their lower end."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OLDEST = dict(
    line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")
)
RANGES = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["trl"]]


def test_what_is_used_below_its_public_surface_is_capped() -> None:
    capped = {line.partition(">=")[0] for line in RANGES if re.search(r",<\d+$", line)}
    assert capped == {"torch", "transformers", "peft", "accelerate"}


def test_the_oldest_set_is_the_lower_end_of_the_ranges() -> None:
    floors = {name: floor for line in RANGES for name, floor in re.findall(r"^([\w-]+)>=([\d.]+)", line)}
    for name in ("transformers", "peft", "accelerate", "datasets", "safetensors", "typer", "rich", "pydantic", "trl"):
        assert OLDEST[name].removesuffix(".0") == floors[name].removesuffix(".0"), name
