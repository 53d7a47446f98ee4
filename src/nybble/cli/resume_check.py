"""`nybble resume-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def resume_check(
    run: Annotated[str, typer.Argument(help="the output_dir of a run, finished or not")],
    steps: Annotated[int, typer.Option("--steps", help="optimizer steps that are trained twice")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="print what was found on stdout as JSON")] = False,
) -> int:
    """Train a run's first steps undisturbed and interrupted, and compare them bit by bit. The run is not touched."""
    from dataclasses import asdict

    from nybble.cli.flags import print_json, quiet_libraries
    from nybble.units import format_seconds

    quiet_libraries()
    from nybble.cli.progress import Live
    from nybble.resume_check import resume_check as check

    live = Live()
    try:
        found = check(Path(run), steps=steps, observer=live)
    finally:
        live.close()
    if as_json:
        print_json(asdict(found))
    else:
        print(f"{found.steps} steps, interrupted by {'; '.join(found.interruptions)} ({format_seconds(found.seconds)})")
        if found.identical:
            print(f"identical: {found.n_tensors} tensors (weights, optimizer, generators) and every logged figure")
        else:
            print(f"different by up to {found.largest_difference:.3g} in {', '.join(found.different[:8])}")
    return 0 if found.identical else 3
