"""What is compared: arms, each a recipe and its seeds, which differ in method or objective and its learning rate.

A learning rate suits one kind of training: adapters learn best at about ten times the rate of full training (Schulman
et al., "LoRA Without Regret", 2025; fifteen times below 100 steps). So an arm of the recipe's own kind gets the rate of
the recipe, and an arm of the other kind a tenth or ten times of it, unless a rate is given: `full=2e-5`, `full=probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from nybble.errors import InputError, RecipeError
from nybble.recipe import Objective, Recipe, load_recipe, save_recipe

METHODS: tuple[str, ...] = get_args(Recipe.model_fields["method"].annotation)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
FULL_RATE = 0.1  # times the rate of adapters


@dataclass(frozen=True)
class Trial:
    """One run of an arm; the folder tells runs apart."""

    seed: int
    run_dir: Path
    recipe_file: Path  # the recipe that the run is started with
    recipe: Recipe = field(hash=False)


@dataclass(frozen=True)
class ArmPlan:
    """One arm: its name, the origin of its learning rate, and its runs."""

    name: str
    rate_source: str  # where the learning rate comes from, for people
    recipe: Recipe
    trials: tuple[Trial, ...]


def arms_of_methods(recipe: Recipe, methods: Sequence[str], seeds: int, folder: Path) -> list[ArmPlan]:
    """The same recipe under each of `methods`, given as `name` or `name=learning_rate`.

    Raises:
        RecipeError: a method is unknown or named twice, or a rate is invalid.
    """
    plans: list[ArmPlan] = []
    for word in methods:
        method, _, rate = (part.strip() for part in word.partition("="))
        if method not in METHODS:
            raise RecipeError(f"--methods: unknown method {method!r}; allowed: {', '.join(METHODS)}")
        if any(plan.name == method for plan in plans):
            raise RecipeError(f"--methods: {method} is named twice; name it once, and use --seeds for repeats")
        own, source = _rate(recipe, method, rate)
        lora = (
            {} if method == "qlora" else {"lora.init_lora_weights": "default"}
        )  # the other initialisations need 4 bits
        arm = load_recipe(None, _flat(recipe) | {"method": method, "training.learning_rate": own} | lora)
        plans.append(_plan(method, source, arm, seeds, folder))
    return plans


def arms_of_objectives(recipe: Recipe, objectives: Sequence[str], seeds: int, folder: Path) -> list[ArmPlan]:
    """The same recipe under each of `objectives`, given as `name` or `name=learning_rate`.

    Raises:
        RecipeError: an objective is unknown or named twice, or a rate is invalid.
    """
    plans: list[ArmPlan] = []
    for word in objectives:
        name, _, rate = (part.strip() for part in word.partition("="))
        if name not in OBJECTIVES:
            raise RecipeError(f"--objectives: unknown objective {name!r}; allowed: {', '.join(OBJECTIVES)}")
        if any(plan.name == name for plan in plans):
            raise RecipeError(f"--objectives: {name} is named twice; name it once, and use --seeds for repeats")
        changes: dict[str, Any] = {"preferences.objective": name}
        if rate:
            changes["training.learning_rate"] = rate
        if name == "sft" and recipe.data.data_format == "auto":
            changes["data.data_format"] = "preference"  # the chosen answers of the same pairs
        arm = load_recipe(None, _flat(recipe) | changes)
        plans.append(_plan(name, "given" if rate else "the recipe's", arm, seeds, folder))
    return plans


def arms_of_recipes(
    files: Sequence[Path | str], overrides: Mapping[str, Any], seeds: int, folder: Path
) -> list[ArmPlan]:
    """One arm for each recipe file, named after the file."""
    plans: list[ArmPlan] = []
    for file in files:
        name = stem = Path(file).stem
        while any(plan.name == name for plan in plans):
            name = f"{stem}-{len(plans) + 1}"
        plans.append(_plan(name, "the recipe's", load_recipe(file, overrides), seeds, folder))
    return plans


def check_folder(folder: Path, plans: Sequence[ArmPlan]) -> None:
    """Check that the folder is new, or has this very comparison, which is then continued.

    Raises:
        InputError: the folder has something else in it.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "comparison.json").is_file()):
        raise InputError(f"{folder} has something other than a comparison in it; choose another folder with --out")
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


def _plan(name: str, source: str, recipe: Recipe, seeds: int, folder: Path) -> ArmPlan:
    trials = []
    first = recipe.training.seed
    held_out_by = first if recipe.data.eval_seed is None else recipe.data.eval_seed
    for seed in range(first, first + seeds):
        label = name if seeds == 1 else f"{name}-seed{seed}"
        changes = {
            "training.seed": seed,
            "data.eval_seed": held_out_by,
            "training.output_dir": str(folder / label),
            "training.push_to_hub": False,
        }
        own = load_recipe(None, _flat(recipe) | changes)
        trials.append(Trial(seed, folder / label, folder / "recipes" / f"{label}.yaml", own))
    return ArmPlan(name, source, recipe, tuple(trials))


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Setting -> value, as overrides are written."""
    content = recipe.model_dump(mode="python")
    flat = {f"{key}.{name}": v for key, part in content.items() if isinstance(part, dict) for name, v in part.items()}
    return flat | {"method": recipe.method}


def _first_difference(saved: str, wanted: str) -> str:
    pairs = zip(saved.splitlines(), wanted.splitlines(), strict=False)
    return next((f"{a.strip()} there, {b.strip()} here" for a, b in pairs if a != b), "its settings differ")
