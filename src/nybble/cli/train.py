"""`nybble train`."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from nybble.cli.options import RecipeFile, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.errors import RecipeError
from nybble.recipe import load_recipe


@takes_settings()
def train(
    overrides: dict[str, Any],
    recipe: RecipeFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the earlier run in output_dir.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output_dir.")
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="Continue if output_dir holds a run, otherwise start a new one."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Start even if the plan says that the run does not fit; resume even if what is learned from has "
            "changed.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json on stdout.")] = False,
) -> None:
    """Fine-tune a model.

    Every setting of the recipe is an option, as --learning_rate 2e-4. Names may be written with dashes, with their
    section (--training.seed 1) or as other tools name them (--lr 2e-4). An option without a value means true, --no-NAME
    means false.
    """
    on_existing = _on_existing(overwrite=overwrite, resume=resume, auto_resume=auto_resume)
    resolved = load_recipe(recipe, overrides)
    import_libraries()
    from nybble import pipeline
    from nybble.run.rendezvous import from_environment

    is_main = from_environment().is_main
    record = pipeline.train(
        resolved,
        on_existing=on_existing,
        force=force,
    )
    if not is_main:
        return
    if as_json:
        print_json(record.to_json())
    else:
        print_outcome(record.run_dir)


def _on_existing(*, overwrite: bool, resume: bool, auto_resume: bool) -> Any:
    if overwrite and (resume or auto_resume):
        flag = "--resume" if resume else "--auto-resume"
        raise RecipeError(f"--overwrite removes the run that {flag} would continue; give one of them")
    if overwrite:
        return "overwrite"
    if resume:
        return "resume"
    return "resume_if_any" if auto_resume else "refuse"


def print_outcome(run_dir: str) -> None:
    """Print the results of a run in a few lines."""
    from rich.console import Console
    from rich.table import Table

    from nybble.reporting import preference_figures
    from nybble.run.directory import read_record
    from nybble.units import format_bytes, format_count, format_number, format_seconds, format_share

    record = read_record(run_dir)
    base, tuned = record["evaluation_base"] or {}, record["evaluation_tuned"] or {}
    table = Table("held-out rows", "base", "tuned", box=None, pad_edge=False)
    table.add_row("loss", format_number(base.get("loss")), format_number(tuned.get("loss")))
    table.add_row("perplexity", format_number(base.get("perplexity"), 2), format_number(tuned.get("perplexity"), 2))
    if tuned.get("exact_match") is not None:
        table.add_row("exact match", format_share(base.get("exact_match")), format_share(tuned["exact_match"]))
    for row in preference_figures(base.get("preferences") or {}, tuned.get("preferences") or {}):
        table.add_row(*row)
    console = Console(highlight=False)
    console.print()
    if tuned:
        console.print(table)
    console.print(
        f"{format_count(record['tokens_per_second'])} tokens/s, peak {format_bytes(record['peak_bytes'])}, "
        f"{format_seconds(record['seconds'])} in all"
    )
    console.print(f"run: {run_dir}   report: {run_dir}/report.html", soft_wrap=True, markup=False)
    console.print(f'ask it: nybble ask {shlex.quote(run_dir)} "..."', soft_wrap=True, markup=False)
