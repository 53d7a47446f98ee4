"""Every setting by every odd value, in a recipe and on the command line: what is taken, what is refused, how fast.

    python -m tools.settings_matrix           writes docs/evidence/settings-matrix.md
    python -m tools.settings_matrix --json    prints every outcome

Nothing is loaded or trained: what a recipe's schema lets through, the checks of model, rows and device see next.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nybble.errors import RecipeError
from nybble.recipe import all_settings, load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "evidence" / "settings-matrix.md"
_NAN = float("nan")
# What is odd -> as a recipe's mapping has it, and as it is typed; None: it cannot be typed.
ODDITIES: dict[str, tuple[Any, str | None]] = {
    "-1": (-1, "-1"),
    "0": (0, "0"),
    "1e30": (1e30, "1e30"),
    "nan": (_NAN, ".nan"),
    "400 digits": (10**400, "9" * 400),
    "empty": ("", ""),
    "[]": ([], None),
    "{}": ({}, None),
    "[[1]]": ([[1]], "[[1]]"),
    "{a: nan}": ({"a": _NAN}, "{a: .nan}"),
    "object": (object(), None),
    "true": (True, "true"),
    "null": (None, None),
}


def measure() -> list[dict[str, Any]]:
    """Every outcome: `message` is None where the value is taken."""
    found = []
    for setting in all_settings():
        for oddity, (value, typed) in ODDITIES.items():
            ways = {"recipe": (value,)} if typed is None else {"recipe": (value,), "typed": (typed,)}
            for way, (given,) in ways.items():
                begun, message = time.perf_counter(), None
                try:
                    if way == "typed":
                        load_recipe(None, {setting.path: given})
                    else:
                        load_recipe({setting.path: given})
                except RecipeError as error:
                    message = str(error)
                seconds = time.perf_counter() - begun
                found.append(
                    {"setting": setting.path, "oddity": oddity, "way": way, "message": message, "seconds": seconds}
                )
    return found


def page(found: list[dict[str, Any]]) -> str:
    """docs/evidence/settings-matrix.md."""
    from nybble.hardware import detect_device  # brings torch

    taken: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    slowest: dict[str, float] = defaultdict(float)
    for case in found:
        if case["message"] is None:
            taken[case["setting"]][case["oddity"]].add(case["way"])
        slowest[case["setting"]] = max(slowest[case["setting"]], case["seconds"])
    words = {frozenset(): "", frozenset({"recipe"}): "recipe", frozenset({"typed"}): "typed"}
    lines = [
        f"| setting | {' | '.join(ODDITIES)} | slowest, ms |",
        f"|---|{'---|' * len(ODDITIES)}---:|",
    ]
    for setting in slowest:
        cells = [words.get(frozenset(taken[setting][oddity]), "taken") for oddity in ODDITIES]
        lines.append(f"| `{setting}` | {' | '.join(cells)} | {1000 * slowest[setting]:.1f} |")
    refused = [case for case in found if case["message"] is not None]
    longest = max(refused, key=lambda case: len(case["message"]))
    slowest_ms = 1000 * max(slowest.values())
    where = f"{detect_device('cpu').name}, Python {platform.python_version()}, with other programs running"
    counts = f"{len(found):,} recipes. {len(found) - len(refused):,} are taken and {len(refused):,} refused"
    return f"""# Evidence: every setting by every odd value

`python -m tools.settings_matrix` gives each of {len(slowest)} settings {len(ODDITIES)} odd values, in a mapping and,
where it can be typed, on the command line: {counts}, each in one line that
names the setting; the longest line has {len(longest["message"])} characters (`{longest["setting"]}`). There is no
traceback, and nothing heavy is imported. The slowest answer took {slowest_ms:.0f} ms
({where}, {datetime.now(UTC):%Y-%m-%d}).
The test suite runs the same code (`tests/arch/test_imports.py`).

"taken" says that the schema lets the value through, because it can be meant: a `max_steps` of -1, a dropout of 0, a
folder called "true". A folder that does not exist is refused by the next stage. "recipe" and "typed" say that only one
of the two ways takes it, and an empty cell that both refuse it.

{chr(10).join(lines)}
"""


def main() -> int:
    """Write the page, or print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print every outcome and the modules that are loaded")
    wanted = parser.parse_args()
    found = measure()
    if wanted.json:
        print(json.dumps({"found": found, "modules": sorted(sys.modules)}))
    else:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
