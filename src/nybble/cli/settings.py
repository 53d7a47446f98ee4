"""`nybble settings`."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli.terminal import print_json
from nybble.recipe import SECTIONS, all_settings, json_schema


def settings(
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List every setting with its default and meaning."""
    if as_json:
        print_json(json_schema())
        return
    for section, meaning in SECTIONS.items():
        print(f"{section or 'method'}: {meaning}\n")
        for item in all_settings():
            if item.section == section:
                print(f"  {item.name:<28} {item.values:<24} {item.meaning} Default: {item.default_text}.")
        print()
