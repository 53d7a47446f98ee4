"""`nybble probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def probe(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="a YAML recipe; flags alone will do")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="name=value, may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print rates and losses on stdout as JSON")] = False,
) -> None:
    """Find the learning rate of a run by trying five in small. Nothing is kept."""
    from dataclasses import asdict

    from nybble.cli.flags import print_json, quiet_libraries, read_flags, split_recipe

    recipe, words = split_recipe(recipe, context.args)
    overrides = read_flags(words, assignments)
    quiet_libraries()
    from nybble import pipeline
    from nybble.cli.progress import Live

    live = Live()
    try:
        found = pipeline.probe(Path(recipe) if recipe else None, overrides, observer=live)
    finally:
        live.close()
    if as_json:
        print_json(asdict(found))
        return
    for branch in found.branches:
        loss = "diverged" if branch.loss is None else f"{branch.loss:.4f}"
        print(f"{branch.learning_rate:<8g} {loss}{'  <-' if branch.learning_rate == found.learning_rate else ''}")
