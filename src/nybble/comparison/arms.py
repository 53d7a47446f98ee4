"""What is compared: arms, each a recipe and its seeds, made so that nothing but the method and its rate differs.

A rate is right for one kind of training: adapters learn best at about ten times the rate of all parameters (Schulman
et al., "LoRA Without Regret", 2025; fifteen times below 100 steps). So the recipe's own rate goes to its own kind, and
a tenth or tenfold to the other, unless a rate is given: `full=2e-5`, or `full=probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from nybble.errors import InputError, RecipeError
from nybble.recipe import Recipe, load_recipe, save_recipe

METHODS: tuple[str, ...] = get_args(Recipe.model_fields["method"].annotation)
FULL_RATE = 0.1  # of the adapters' rate


@dataclass(frozen=True)
class Trial:
    """One run of an arm."""

    seed: int
    run_dir: Path
    recipe_file: Path  # what the run is started with
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    """One arm: what it is called, how its rate came about, and its runs."""

    name: str
    rate_source: str
    recipe: Recipe
    trials: tuple[Trial, ...]


def arms_of_methods(recipe: Recipe, methods: Sequence[str], seeds: int, folder: Path) -> list[Plan]:
    """The same recipe under each of `methods`, given as `name` or `name=learning_rate`.

    Raises:
        RecipeError: an unknown method, one named twice, or a rate that is none.
    """
    plans: list[Plan] = []
    for word in methods:
        method, _, rate = (part.strip() for part in word.partition("="))
        if method not in METHODS:
            raise RecipeError(f"--methods: unknown method {method!r}; allowed: {', '.join(METHODS)}")
        if any(plan.name == method for plan in plans):
            raise RecipeError(f"--methods: {method} is named twice; name it once, and use --seeds for repeats")
        own, source = _rate(recipe, method, rate)
        lora = {} if method == "qlora" else {"init_lora_weights": "default"}  # the others start from 4 bits
        arm = load_recipe(None, _flat(recipe) | {"method": method, "learning_rate": own} | lora)
        plans.append(_plan(method, source, arm, seeds, folder))
    return plans


def arms_of_recipes(files: Sequence[Path | str], overrides: Mapping[str, Any], seeds: int, folder: Path) -> list[Plan]:
    """Each recipe as it stands, called by its file's name."""
    plans: list[Plan] = []
    for file in files:
        name = stem = Path(file).stem
        while any(plan.name == name for plan in plans):
            name = f"{stem}-{len(plans) + 1}"
        plans.append(_plan(name, "the recipe's", load_recipe(file, overrides), seeds, folder))
    return plans


def check_folder(folder: Path, plans: Sequence[Plan]) -> None:
    """The folder is new, or holds this very comparison, which then goes on.

    Raises:
        InputError: it holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "comparison.json").is_file()):
        raise InputError(f"{folder} holds something other than a comparison; choose another folder with --out")
    wanted = {trial.recipe_file: save_recipe(trial.recipe) for plan in plans for trial in plan.trials}
    saved = {file: text for file in wanted if file.is_file() and (text := file.read_text(encoding="utf-8"))}
    strangers = any((folder / "recipes").glob("*.yaml")) and not saved
    differing = next((file for file, text in saved.items() if text != wanted[file]), None)
    if differing is not None or strangers:
        what = f": {_first_difference(saved[differing], wanted[differing])}" if differing else ""
        raise InputError(
            f"{folder} is the comparison of another recipe{what}; choose another folder with --out, or --overwrite it"
        )


def _rate(recipe: Recipe, method: str, given: str) -> tuple[float | str, str]:
    if given:
        return given, "given"
    own = recipe.training.learning_rate
    if own == "probe" or (method == "full") == (recipe.method == "full"):
        return own, "the recipe's"
    if method == "full":
        return FULL_RATE * own, "a tenth of the recipe's, which is for adapters"
    return own / FULL_RATE, "ten times the recipe's, which is for all parameters"


def _plan(name: str, source: str, recipe: Recipe, seeds: int, folder: Path) -> Plan:
    trials = []
    first = recipe.training.seed
    held_out_by = first if recipe.data.eval_seed is None else recipe.data.eval_seed  # the same rows for every seed
    for seed in range(first, first + seeds):
        label = name if seeds == 1 else f"{name}-seed{seed}"
        changes = {"seed": seed, "eval_seed": held_out_by, "output_dir": str(folder / label), "push_to_hub": False}
        own = load_recipe(None, _flat(recipe) | changes)
        trials.append(Trial(seed, folder / label, folder / "recipes" / f"{label}.yaml", own))
    return Plan(name, source, recipe, tuple(trials))


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Setting -> value, as overrides are given."""
    content = recipe.model_dump(mode="python")
    flat = {f"{key}.{name}": v for key, part in content.items() if isinstance(part, dict) for name, v in part.items()}
    return flat | {"method": recipe.method}


def _first_difference(there: str, here: str) -> str:
    pairs = zip(there.splitlines(), here.splitlines(), strict=False)
    return next((f"{a.strip()} there, {b.strip()} here" for a, b in pairs if a != b), "its settings are others")
