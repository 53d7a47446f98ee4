"""Settings as flags: every setting of the recipe is a flag, in its own spelling or another tool's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from nybble.errors import RecipeError


def read_flags(words: list[str], assignments: list[str] | None = None) -> dict[str, str]:
    """`--learning-rate 2e-4`, `--learning_rate=2e-4` and `--set training.learning_rate=2e-4` as name -> text.

    A flag without a value means true, and false where its name begins with `no-`; of `--path` every one counts.

    Raises:
        RecipeError: a word that is neither a flag nor a value, or a `--set` without `=`.
    """
    found: dict[str, str] = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set {assignment!r} has no '='; write --set name=value")
        found[name] = value
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise RecipeError(f"unexpected word {word!r}; the recipe comes first, then settings as --name value")
        name, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            has_value = position < len(words) and not words[position].startswith("--")
            value = words[position] if has_value else "true"
            position += has_value
            if not has_value and name.startswith(("no-", "no_")):
                name, value = name[3:], "false"
        found[name] = f"{found[name]},{value}" if name == "path" and name in found else value
    return found


def split_recipe(recipe: str | None, words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe and the flags behind it: where there is no recipe, typer takes the first flag for it."""
    return (None, [recipe, *words]) if recipe is not None and recipe.startswith("--") else (recipe, list(words))


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(content, ensure_ascii=False))


def quiet_libraries() -> None:
    """Let the libraries' bars and advice be silent: this process belongs to the command line.

    Variables that torch reads when it is imported are put right first.
    """
    import logging
    import warnings

    from nybble.diagnostics import prepare

    for said in prepare():
        print(f"nybble: {said}", file=sys.stderr)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate)\..*")
