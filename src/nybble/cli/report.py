"""`nybble report`."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(help="folder of a run or a comparison, finished or not")],
    as_json: Annotated[bool, typer.Option("--json", help="print the path as JSON")] = False,
) -> None:
    """Write report.html, report.md and report.json of a run or comparison anew."""
    from pathlib import Path

    from nybble.cli.flags import print_json
    from nybble.reporting import rewrite_report

    page = rewrite_report(Path(run))
    if as_json:
        print_json({"report": str(page)})
    else:
        print(page)
