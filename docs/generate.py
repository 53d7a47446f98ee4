"""Writes the parts of docs/ that are derived from code: settings.md and recipe.schema.json. `--check` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nybble.recipe import all_settings, json_schema

DOCS = Path(__file__).parent
HEAD = """# Settings

Every setting of a recipe. In a YAML file they may stand flat or in their section; on the command line each is a flag
(`--learning_rate 2e-4`, dashes or underscores). `recipe.schema.json` beside this page lets an editor complete them.
This page is written by `make docs` from the schema.
"""


def settings_page() -> str:
    """docs/settings.md."""
    lines, section = [HEAD], None
    for item in all_settings():
        if item.section != section:
            section = item.section
            lines.append(f"\n## {section or 'method'}\n")
            lines.append("| setting | default | meaning | other names |\n|---|---|---|---|")
        default = "none" if item.default is None else json.dumps(item.default)
        unit = f" ({item.unit})" if item.unit else ""
        aliases = ", ".join(f"`{alias}`" for alias in item.aliases)
        lines.append(f"| `{item.name}` | `{default}` | {item.meaning}{unit} | {aliases} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main() -> int:
    """Write or, with --check, compare; 1 if a file is out of date."""
    wanted = {
        DOCS / "settings.md": settings_page(),
        DOCS / "recipe.schema.json": json.dumps(json_schema(), indent=1) + "\n",
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.name} is out of date: run make docs\n")
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
