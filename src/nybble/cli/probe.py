"""`nybble probe`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nybble.cli.options import RecipeFile, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.recipe import load_recipe


@takes_settings()
def probe(
    overrides: dict[str, Any],
    recipe: RecipeFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rates and losses on stdout as JSON.")] = False,
) -> None:
    """Find the learning rate by five short trials.

    Nothing is saved; give the rate that is found to nybble train.
    """
    from dataclasses import asdict

    resolved = load_recipe(recipe, overrides)
    import_libraries()
    from nybble import pipeline

    found = pipeline.probe(resolved)
    if as_json:
        print_json(asdict(found))
        return
    for branch in found.branches:
        loss = "diverged" if branch.loss is None else f"{branch.loss:.4f}"
        print(f"{branch.learning_rate:<8g} {loss}{'  <-' if branch.learning_rate == found.learning_rate else ''}")
