"""`nybble import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.terminal import print_json
from nybble.errors import InputError
from nybble.guard import visible


def import_recipe(
    file: Annotated[str, typer.Argument(help="A recipe of TRL, Axolotl or LLaMA-Factory, as a YAML file.")],
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="New file for the recipe. Default: stdout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print settings and remarks on stdout as JSON.")] = False,
) -> None:
    """Write a recipe from one of TRL, Axolotl or LLaMA-Factory.

    Each setting that means something else or nothing here is named, with what does the same.
    """
    from nybble.recipe.importing import import_recipe as read
    from nybble.storage.atomic import write_text

    target = Path(output).expanduser() if output else None
    if target is not None and target.exists():
        raise InputError(f"{target} already exists; choose a new file")
    found = read(file)
    text = found.to_yaml(Path(file).name)
    for remark in found.remarks:
        print(visible(remark), file=sys.stderr)
    if target is not None:
        write_text(target, text)
        print(f"{target}: from a recipe of {found.tool}; try it with nybble plan {target}", file=sys.stderr)
    if as_json:
        print_json({"tool": found.tool, "settings": found.settings, "remarks": list(found.remarks)})
    elif target is None:
        print(text, end="")
