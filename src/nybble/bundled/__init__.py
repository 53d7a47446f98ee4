"""What comes with Nybble: recipes, and the demo's base model, rows and recipe, which `tools/build_demo` builds."""

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


def recipes() -> dict[str, Path]:
    """The recipes that can be given by their names, in alphabetical order."""
    return {file.stem: file for file in sorted((_HERE / "recipes").glob("*.yaml"))}
