"""`nybble train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="a YAML recipe; flags alone will do")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="name=value, may be repeated")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the former run in output_dir")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in output_dir")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="go on if output_dir holds a run, else begin: one line for every start"),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="try even what the plan says cannot fit")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print run.json on stdout")] = False,
) -> None:
    """Fine-tune a model. Every setting (see nybble settings) is a flag: --learning_rate 2e-4."""
    from nybble.cli.flags import print_json, quiet_libraries, read_flags, split_recipe

    recipe, words = split_recipe(recipe, context.args)
    overrides = read_flags(words, assignments)
    quiet_libraries()
    from nybble import pipeline
    from nybble.cli.progress import Live
    from nybble.recipe import load_recipe
    from nybble.run.rendezvous import from_environment

    is_main = from_environment().is_main
    live = Live()
    try:
        record = pipeline.train(
            load_recipe(Path(recipe) if recipe else None, overrides),
            overwrite=overwrite,
            resume=resume,
            auto_resume=auto_resume,
            force=force,
            observer=live,  # told by the first process alone
        )
    finally:
        live.close()
    if not is_main:
        return
    if as_json:
        print_json(record.to_json())
    else:
        print_outcome(record.run_dir)


def print_outcome(run_dir: str) -> None:
    """The end of a run in a few lines."""
    from rich.console import Console
    from rich.table import Table

    from nybble.run.directory import read_record
    from nybble.units import format_bytes, format_count, format_number, format_seconds, format_share

    record = read_record(run_dir)
    base, tuned = record["evaluation_base"] or {}, record["evaluation_tuned"] or {}
    table = Table("held-out rows", "base", "tuned", box=None, pad_edge=False)
    table.add_row("loss", format_number(base.get("loss")), format_number(tuned.get("loss")))
    table.add_row("perplexity", format_number(base.get("perplexity"), 2), format_number(tuned.get("perplexity"), 2))
    if tuned.get("exact_match") is not None:
        table.add_row("exact match", format_share(base.get("exact_match")), format_share(tuned["exact_match"]))
    console = Console(highlight=False)
    console.print()
    if tuned:
        console.print(table)
    console.print(
        f"{format_count(record['tokens_per_second'])} tokens/s, peak {format_bytes(record['peak_bytes'])}, "
        f"{format_seconds(record['seconds'])} in all"
    )
    console.print(f"run: {run_dir}   report: {run_dir}/report.html", soft_wrap=True, markup=False)
    console.print(f'ask it: nybble ask {run_dir} "..."', soft_wrap=True, markup=False)
