"""The bundled base model, its rows and the recipe of the demo; `tools/build_demo` builds them."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def base_path() -> Path:
    """Folder of the bundled base model."""
    return _HERE / "base"


def train_rows_path() -> Path:
    """The 1,000 training rows."""
    return _HERE / "rows" / "train.jsonl"


def heldout_rows_path() -> Path:
    """The 200 held-out rows."""
    return _HERE / "rows" / "heldout.jsonl"


def recipe_path() -> Path:
    """The demo's recipe; model and rows are filled in by `nybble demo`."""
    return _HERE / "recipe.yaml"
