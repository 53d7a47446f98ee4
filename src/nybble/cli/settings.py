"""`nybble settings`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated

import typer

from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.errors import RecipeError
from nybble.recipe import SECTIONS, Setting, all_settings, json_schema, path_of

_INDENT = "      "


def settings(
    names: Annotated[
        list[str] | None, typer.Argument(help="Settings to describe, with every value that they allow. Default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List every setting with its default and meaning."""
    if as_json:
        if names:
            raise RecipeError("--json prints the schema of all settings; remove the names, or --json")
        print_json(json_schema())
        return
    if names:
        wanted = [path_of(name) for name in names]
        _print_some([item for path in wanted for item in all_settings() if item.path == path])
        return
    for section, meaning in SECTIONS.items():
        print(f"{section or 'method'}: {meaning}\n")
        for item in all_settings():
            if item.section == section:
                _print(item)
        print()


def _print(item: Setting) -> None:
    """Two lines and more on a terminal; one line, which `grep` finds whole, elsewhere."""
    meaning = f"{item.meaning} Default: {item.default_text}."
    if not sys.stdout.isatty():
        print(f"  {item.name:<28} {item.values:<24} {meaning}")
        return
    width = min(shutil.get_terminal_size().columns, 120)
    print(f"  {item.name} {item.values}")
    print(textwrap.fill(meaning, width, initial_indent=_INDENT, subsequent_indent=_INDENT))


def _print_some(items: list[Setting]) -> None:
    lists = {"optim", "lr_scheduler_type", "report_to"} & {item.name for item in items}
    listed = _listed_by_libraries() if lists else {}
    for item in items:
        _print(item)
        if item.aliases:
            print(f"{_INDENT}Other names: {', '.join(item.aliases)}.")
        if item.name in listed:
            words = f"Allowed: {', '.join(listed[item.name]())}."
            print(textwrap.fill(words, 100, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False))


def _listed_by_libraries() -> dict[str, Callable[[], list[str]]]:
    """Settings whose values are names of other libraries, which take seconds to import."""
    import_libraries()
    from nybble import training

    return {
        "optim": training.optimizer_names,
        "lr_scheduler_type": training.schedule_names,
        "report_to": training.known_trackers,
    }
