"""`nybble compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli.options import takes_settings
from nybble.cli.terminal import print_json
from nybble.recipe import load_recipe

if TYPE_CHECKING:
    from nybble.comparison import Comparison


@takes_settings(without=("output_dir",))
def compare(
    overrides: dict[str, Any],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="recipe", help="A recipe as a YAML file, or several recipes to compare."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Compare these methods, as qlora,lora,full; full=2e-5 or full=probe gives one its own learning rate.",
        ),
    ] = "",
    objectives: Annotated[
        str,
        typer.Option(
            "--objectives",
            metavar="NAMES",
            help="Compare these objectives instead, as sft,dpo,orpo; dpo=5e-6 gives one its own learning rate.",
        ),
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat each run with N seeds.")] = 1,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "--output_dir",
            metavar="FOLDER",
            help="Folder of the comparison. Default: the recipe's output_dir and -compare.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over instead of continuing an earlier comparison.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json on stdout.")] = False,
) -> None:
    """Compare methods or recipes on the same rows.

    Each run has the same rows, seed and evaluation. The report says which one is better, and how certain that is.
    """
    for recipe in recipes or []:
        load_recipe(recipe, overrides)  # a wrong recipe is refused before the first run
    from nybble import comparison

    found = comparison.compare(
        recipes or [],
        overrides,
        methods=[word for word in methods.split(",") if word.strip()],
        objectives=[word for word in objectives.split(",") if word.strip()],
        seeds=seeds,
        out=out,
        overwrite=overwrite,
    )
    if as_json:
        print_json(found.to_json())
    else:
        print_comparison(found)


def print_comparison(found: Comparison) -> None:
    """Print the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    from nybble.reporting import comparison_lines

    table = Table("", *(arm.name for arm in found.arms), box=None, pad_edge=False)
    for what, *values in comparison_lines(found.to_json()["arms"]):
        table.add_row(what, *values)
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(f"\n{found.verdict}", markup=False)
    console.print(f"\nreport: {Path(found.out) / 'report.html'}", soft_wrap=True, markup=False)
