"""`nybble report`."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli.terminal import print_json


def report(
    run: Annotated[str, typer.Argument(help="Folder of a run or a comparison, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the path as JSON.")] = False,
) -> None:
    """Write the report of a run or a comparison again."""
    from pathlib import Path

    from nybble.reporting import rewrite_report

    page = rewrite_report(Path(run))
    if as_json:
        print_json({"report": str(page)})
    else:
        print(page)
