"""`nybble data`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli.options import RecipeFile, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.guard import visible
from nybble.recipe import load_recipe

if TYPE_CHECKING:
    from nybble.data import ShownRow

_LONGEST_IN_TABLE = 40  # characters; longer values, such as why a row was skipped, are printed below the table


@takes_settings(("model", "data", "preferences"))
def data(
    overrides: dict[str, Any],
    recipe: RecipeFile = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Show this many rows.")] = 5,
    find: Annotated[str, typer.Option("--find", metavar="TEXT", help="Show only rows that contain this text.")] = "",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the counts and the rows to this HTML page.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the counts of all rows and of each shown row on stdout as JSON.")
    ] = False,
) -> None:
    """Count the rows and show which tokens are learned.

    They are green (red in answers that are rejected or bad), or in [[..]] where there are no colours. Nothing is
    trained. The folder of a tokenizer is enough; no model is needed.
    """
    from dataclasses import asdict

    resolved = load_recipe(recipe, overrides)
    import_libraries()
    from nybble import pipeline
    from nybble.errors import InputError, RowsError
    from nybble.reporting import ledger_lines, rows_page
    from nybble.storage.atomic import write_text

    if html is not None and not html.parent.is_dir():
        raise InputError(f"--html {html}: the folder {html.parent} does not exist; create it, or name another file")
    found = pipeline.inspect_rows(resolved, show=show, find=find)
    ledger = asdict(found.ledger)
    if html is not None:
        write_text(html, rows_page(found.source, ledger, found.rows))
    if as_json:
        print_json({"ledger": ledger, "rows": [_as_json(row) for row in found.rows]})
    else:
        _print(ledger_lines(ledger), found.rows, html)
    if found.fault:
        raise RowsError(found.fault)


def _as_json(row: ShownRow) -> dict[str, Any]:
    names = ("row", "use", "tokens", "trained", "stops", "truncated", "input_ids", "segments")
    spans = [{"first": first, "end": end, "kind": kind} for first, end, kind in row.spans]
    found = {name: getattr(row, name) for name in names} | {"spans": spans}
    if row.is_pair:
        found["pair"] = True
    return found if row.is_desirable is None else found | {"label": row.is_desirable}


def _print(lines: Sequence[tuple[str, str]], rows: Sequence[ShownRow], html: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for what, value in lines:
        if len(value) <= _LONGEST_IN_TABLE:
            table.add_row(Text(visible(what)), Text(visible(value)))
    console.print(table)
    for what, value in lines:
        if len(value) > _LONGEST_IN_TABLE:
            console.print(Text(visible(f"{what}: {value}")), soft_wrap=True)
    for row in rows:
        console.print(Text(f"\n{row.title}", style="bold"))
        text = Text()
        is_colourless = console.color_system is None or console.no_color
        for is_learned, parts in groupby(row.parts, key=lambda part: part.is_learned):
            brackets = ("[[", "]]") if is_learned and is_colourless else ("", "")
            text.append(brackets[0])
            for part in parts:
                style = "red" if part.is_rejected else "green" if is_learned else "dim"
                text.append(visible(part.text), style=f"{style} reverse" if part.is_control else style)
            text.append(brackets[1])
        console.print(text, soft_wrap=True)
    if html is not None:
        console.print(f"\npage: {html}", markup=False, soft_wrap=True)
