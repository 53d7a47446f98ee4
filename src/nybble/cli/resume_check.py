"""`nybble resume-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json


def resume_check(
    run: Annotated[str, typer.Argument(help="The output_dir of a run, finished or not.")],
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps that are trained twice.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result on stdout as JSON.")] = False,
) -> int:
    """Prove that an interrupted run gives the same bits.

    The first steps are trained without and with interruptions and compared bit by bit. The run is not changed.
    """
    from dataclasses import asdict

    from nybble.units import format_seconds

    import_libraries()
    from nybble.interruptions import resume_check as check

    found = check(Path(run), steps=steps)
    if as_json:
        print_json(asdict(found))
    else:
        print(f"{found.steps} steps, interrupted by {'; '.join(found.interruptions)} ({format_seconds(found.seconds)})")
        if found.identical:
            print(f"identical: {found.n_tensors} tensors (weights, optimizer, generators) and every logged figure")
        else:
            print(f"different by up to {found.largest_difference:.3g} in {', '.join(found.different[:8])}")
    return 0 if found.identical else 3
