"""`nybble compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nybble.comparison import Comparison


def compare(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="a YAML recipe, or several to hold against each other")] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="qlora,lora,full; a rate of its own as full=2e-5 or full=probe")
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", help="repeat each arm with so many seeds")] = 1,
    out: Annotated[
        str | None, typer.Option("--out", "--output_dir", "--output-dir", help="folder; default: the recipe's -compare")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="name=value, may be repeated")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew instead of going on")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print comparison.json on stdout")] = False,
) -> None:
    """Run the same rows, seed and evaluation under several methods, or several recipes, and say which is better."""
    from nybble.cli.flags import print_json, read_flags, split_recipe

    recipe, words = split_recipe(recipe, context.args)
    n_more = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    recipes, words = [*([recipe] if recipe else []), *words[:n_more]], words[n_more:]
    overrides = read_flags(words, assignments)
    from nybble import comparison
    from nybble.cli.progress import Live

    live = Live()
    try:
        found = comparison.compare(
            recipes,
            overrides,
            methods=[word for word in methods.split(",") if word.strip()],
            seeds=seeds,
            out=out,
            overwrite=overwrite,
            observer=live,
        )
    finally:
        live.close()
    if as_json:
        print_json(found.to_json())
    else:
        print_comparison(found)


def print_comparison(found: Comparison) -> None:
    """The table and the verdict."""
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
