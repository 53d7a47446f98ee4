"""Runs the arms of a comparison one after the other, each in a fresh process; a finished run is never repeated.

comparison.json   figures of every arm, differences, verdict
recipes/          the recipe that each run was started with
NAME/             the run of an arm (NAME-seedN if there are several seeds)
NAME.log          what the run printed
report.html       also report.md and report.json
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.comparison.arms import METHODS, ArmPlan, arms_of_methods, arms_of_objectives, arms_of_recipes, check_folder
from nybble.comparison.child import TrialEnding, is_done, run_trial
from nybble.comparison.figures import Comparison, collect
from nybble.comparison.verdict import verdict
from nybble.errors import InputError, error_class
from nybble.recipe import load_recipe, save_recipe
from nybble.reporting import write_comparison_report
from nybble.run.directory import to_json
from nybble.run.progress import ObserverChoice, watching
from nybble.run.record import Observer
from nybble.storage.atomic import write_text


def compare(
    recipes: Sequence[Path | str],
    overrides: Mapping[str, Any] | None = None,
    *,
    methods: Sequence[str] = (),
    objectives: Sequence[str] = (),
    seeds: int = 1,
    out: Path | str | None = None,
    overwrite: bool = False,
    observer: ObserverChoice = "auto",
) -> Comparison:
    """Run one recipe under several `methods` (default: qlora, lora, full) or `objectives`, or several recipes.

    All arms get the same rows, order, seeds, tokens and held-out rows. A method may have a learning rate of its own:
    "full=2e-5" or "full=probe". A comparison that was interrupted continues with its unfinished run. An arm that fails
    or does not fit is reported, and the others still run.

    Raises:
        InputError, CannotRunError: the recipes or the folder cannot be used, or no arm could be run.
        StoppedError: a signal came; the current run has saved what it has.
    """
    folder, plans = _plan(recipes, overrides or {}, methods, objectives, seeds, out)
    if overwrite and (folder / "comparison.json").is_file():
        shutil.rmtree(folder)
    check_folder(folder, plans)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    endings: dict[Path, TrialEnding] = {}
    _write(folder, plans, endings)
    with watching(observer) as watch:
        _run_trials(folder, plans, endings, watch)
    found = _write(folder, plans, endings)
    if not any(arm.measured for arm in found.arms):
        _refuse(list(endings.values()))
    return found


def _run_trials(folder: Path, plans: Sequence[ArmPlan], endings: dict[Path, TrialEnding], watch: Observer) -> None:
    for plan in plans:
        for trial in plan.trials:
            rate = trial.recipe.training.learning_rate
            watch.stage(f"{trial.run_dir.name}: learning rate {rate} ({plan.rate_source})")
            write_text(trial.recipe_file, save_recipe(trial.recipe))
            if is_done(trial):
                watch.note("finished before")
                continue
            endings[trial.run_dir] = run_trial(trial, folder / f"{trial.run_dir.name}.log", watch)
            _write(folder, plans, endings)


def _plan(
    recipes: Sequence[Path | str],
    overrides: Mapping[str, Any],
    methods: Sequence[str],
    objectives: Sequence[str],
    seeds: int,
    out: Any,
) -> tuple[Path, list[ArmPlan]]:
    if not recipes and not overrides:
        raise InputError("no recipe given; e.g. nybble compare recipe.yaml --methods qlora,lora,full")
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least 1 is needed; give a larger number")
    if methods and objectives:
        raise InputError("--methods and --objectives each make arms of one recipe; give one of them")
    if len(recipes) > 1 and objectives:
        raise InputError(f"--objectives needs one recipe, {len(recipes)} were given; remove it to compare the recipes")
    if len(recipes) > 1 and methods:
        raise InputError(f"--methods needs one recipe, {len(recipes)} were given; remove it to compare the recipes")
    first = load_recipe(recipes[0] if recipes else None, overrides)
    folder = Path(out).expanduser() if out else Path(f"{Path(first.training.output_dir).expanduser()}-compare")
    if len(recipes) > 1:
        return folder, arms_of_recipes(recipes, overrides, seeds, folder)
    if objectives:
        return folder, arms_of_objectives(first, objectives, seeds, folder)
    return folder, arms_of_methods(first, methods or METHODS, seeds, folder)


def _write(folder: Path, plans: Sequence[ArmPlan], endings: Mapping[Path, TrialEnding]) -> Comparison:
    found = collect(folder, plans, endings)
    found = replace(found, verdict=verdict(found))
    write_text(folder / "comparison.json", f"{to_json(found.to_json(), indent=2)}\n")
    write_comparison_report(folder)
    return found


def _refuse(endings: Sequence[TrialEnding]) -> None:
    """Raise, because no arm gave a figure. The reason of the first arm is usually the reason of all."""
    first = endings[0]
    raise error_class(first.error_class)(f"no arm could be run; the first: {first.error}")
