"""`nybble plan`."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli.options import RecipeFile, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.errors import RecipeError
from nybble.recipe import load_recipe, refusal
from nybble.recipe.shapes import check_spelling

if TYPE_CHECKING:
    from rich.console import Console

    from nybble.planning import SharedPlan
    from nybble.recipe import Plan


_WIDTH_OF_PARTS = 110  # columns; a narrower terminal is shown the peak of each phase alone


@takes_settings()
def plan(
    overrides: dict[str, Any],
    recipe: RecipeFile = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory that the run may take, whatever is free here."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--device-profile",
            metavar="NAME",
            help="Plan for a device that is not here, as mi300x; --device takes such a name too.",
        ),
    ] = None,
    largest: Annotated[
        bool, typer.Option("--largest", help="Also find the largest max_length and the largest known model that fit.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", min=1, help="Plan what each of N processes takes and sends."),
    ] = None,
    link_rate: Annotated[
        str | None,
        typer.Option("--link-rate", metavar="SIZE", help="Bytes that each process sends per second, as 12GB."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan on stdout as JSON.")] = False,
) -> None:
    """Predict memory and speed of a run.

    The plan has the peak memory of every phase. No weights are read and nothing is trained.
    """
    if memory is not None:
        overrides["memory_budget"] = memory
    if not _is_here(overrides.get("device")):
        profile = profile or str(overrides.pop("device"))
    resolved = load_recipe(recipe, overrides)
    check_spelling(resolved.model.model_name_or_path)
    if link_rate is not None and processes is None:
        raise RecipeError("--link-rate is the rate between several processes; give --processes N with it")
    shared: SharedPlan | None = None
    with _shown_at_work():
        import_libraries()
        from nybble import planning

        if processes is None:
            made = planning.plan(resolved, profile=profile, largest=largest)
        else:
            shared = planning.plan_processes(resolved, n=processes, profile=profile, link_rate=link_rate)
            made = shared.plan
    if as_json:
        print_json((shared or made).to_json())
    else:
        _print(made)
        if shared is not None:
            print("\n".join(shared.lines()))
    if not made.fits:
        raise refusal(made)


def _is_here(device: Any) -> bool:
    """Whether `--device` names a device of this machine, as a training takes it, and not one by its maker's name."""
    return device is None or re.fullmatch(r"auto|cpu|(cuda|hip)(:.*)?", str(device)) is not None


def _shown_at_work() -> AbstractContextManager[Any]:
    """Within, a terminal shows that the plan is being made: large models take many seconds."""
    from rich.console import Console

    return Console(stderr=True).status("Tracing the step without data ..")


def _print(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from nybble.models import MEMORY_SAVERS
    from nybble.units import format_bytes, format_count, format_seconds

    console = Console(highlight=False)
    unit, size = ("GB", 1e9) if made.peak_bytes >= 1e9 else ("MB", 1e6)
    _print_phases(console, made, unit, size)
    console.print()
    estimate = " (estimate)" if made.device["is_estimate"] else ""
    for line in made.lines():
        console.print(line, soft_wrap=True, markup=False)
    if made.total_seconds:
        console.print(f"{format_count(made.optimizer_steps)} steps: {format_seconds(made.total_seconds)}{estimate}")
    if made.rungs:
        levels: Any = Table(f"{unit} of the longest batch", "peak", "tensors", "host", "", box=None, pad_edge=False)
        for r in made.rungs:
            shown = [f"{n / size:.2f}" if n else "–" for n in (r.peak_bytes, r.live_bytes, r.host_bytes)]
            levels.add_row(MEMORY_SAVERS.get(r.name, r.name), *shown, "taken" if r.taken else "")
        console.print(levels)
    if made.largest_length is not None:
        console.print(f"largest max_length that fits: {format_count(made.largest_length)}")
    if made.largest_model is not None:
        name, peak = made.largest_model
        console.print(f"largest known model that fits: {name} ({format_bytes(peak)})")
    if made.cheapest_changes:
        changes: Any = Table("change", "peak", "fits", "what it means", box=None, pad_edge=False)
        for c in made.cheapest_changes:
            changes.add_row(
                f"--{c.setting} {c.value}", format_bytes(c.peak_bytes), "yes" if c.fits else "no", c.meaning
            )
        console.print(changes)
    for note in made.notes:
        console.print(note, soft_wrap=True, markup=False)


def _print_phases(console: Console, made: Plan, unit: str, size: float) -> None:
    from rich.table import Table

    is_narrow = console.is_terminal and console.width < _WIDTH_OF_PARTS
    parts = [] if is_narrow else list(dict.fromkeys(part for phase in made.phases for part in phase.parts))
    table = Table(f"{unit} in", "peak", *parts, box=None, pad_edge=False, padding=(0, 1))
    for column in table.columns:
        column.no_wrap = True
        column.justify = "right" if column is not table.columns[0] else "left"
    for phase in made.phases:
        figures = (phase.peak_bytes, *(phase.parts.get(part) for part in parts))
        table.add_row(phase.name, *("–" if n is None else f"{n / size:.2f}" for n in figures))
    if not is_narrow:
        console.width = max(console.width, _WIDTH_OF_PARTS)
    console.print(table)
