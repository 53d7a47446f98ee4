"""`nybble settings`."""

from __future__ import annotations

from typing import Annotated

import typer


def settings(
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON schema of a recipe, for editors")] = False,
) -> None:
    """List every setting: name, default, unit, meaning."""
    from nybble.recipe import all_settings, json_schema

    if as_json:
        from nybble.cli.flags import print_json

        print_json(json_schema())
        return
    section = None
    for item in all_settings():
        if item.section != section:
            section = item.section
            if section:
                print(f"\n{section}:")
        unit = f" [{item.unit}]" if item.unit else ""
        print(f"  {item.name:<28} {item.default!r:<24} {item.meaning}{unit}")
