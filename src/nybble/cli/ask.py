"""`nybble ask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer


def ask(
    run: Annotated[str, typer.Argument(help="folder of a finished run")],
    questions: Annotated[list[str] | None, typer.Argument(help="one or more questions")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or hip; default: as trained")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the answers on stdout as JSON")] = False,
) -> None:
    """Ask base and tuned model of a run the same questions, side by side."""
    from nybble.cli.flags import print_json, quiet_libraries

    quiet_libraries()
    from dataclasses import asdict

    from nybble import pipeline

    samples = [asdict(sample) for sample in pipeline.ask(run, questions or [], device)]
    if as_json:
        print_json({"run_dir": run, "answers": samples})
    else:
        print_samples(samples)


def print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Prompts with the answers of base and tuned model side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for sample in samples:
        table = Table("base", "tuned", show_lines=False, expand=True)
        table.add_row(Text(sample["base"] or "(nothing)"), Text(sample["tuned"] or "(nothing)"))
        console.print(Text(f"\n{sample['prompt']}", style="bold"))
        console.print(table)
