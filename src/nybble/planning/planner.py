"""The plan of a run from its recipe, its model's config, its rows and its device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nybble.data import examine_rows, packs_of
from nybble.errors import ModelError, NybbleError
from nybble.hardware import detect_device
from nybble.models import compute_dtype, find_folder, find_tokenizer, read_config
from nybble.planning.devices import Profile, named_profile, profile_of
from nybble.planning.extrapolate import TracedModel
from nybble.planning.phases import Batches, Forecast
from nybble.planning.search import (
    ChosenSettings,
    changed,
    cheapest_changes,
    choose,
    largest_length,
    largest_model,
    plan_levels,
)
from nybble.planning.shapes import config_of, known_shape, not_known
from nybble.recipe import ModelSection, Plan, Recipe, load_recipe


def find_config(model: ModelSection) -> tuple[Any, str | None]:
    """transformers' config of a folder, a known shape or a hub id (only its small files), and a note on where from.

    Raises:
        ModelError: none of these, or a config that lacks what a language model needs.
    """
    name = model.model_name_or_path
    if not name:
        raise ModelError("no model given; set --model_name_or_path to a folder, a hub id or a known shape")
    shape = None if Path(name).expanduser().exists() else known_shape(name)
    if shape is not None:
        return config_of(shape), f"{name}: the known shape {shape}"
    try:
        folder = find_folder(name, model.model_revision, with_weights=False, with_code=model.trust_remote_code)
    except NybbleError as error:
        if "/" in name and Path(name).is_absolute():
            raise
        raise not_known(name) from error
    config = read_config(folder, model.trust_remote_code)
    text = config.get_text_config()
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    missing = [field for field in needed if not getattr(text, field, None)]
    if missing:
        raise ModelError(f"{folder}/config.json lacks {', '.join(missing)}; it cannot be planned for")
    return config, None


def plan(
    recipe: Recipe | Path | str | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    profile: str | None = None,
    largest: bool = False,
) -> Plan:
    """What a run will do and take in every phase, before any weight is read.

    Args:
        recipe: a Recipe or a YAML file, with `overrides` on top. Its model may be a folder, a hub id (of which only the
            small files are fetched) or a known shape such as `llama-2-7b`. Its rows are read where they can be.
        overrides: settings by name.
        profile: a device that is not here, by its name in `PROFILES`; default: the recipe's device.
        largest: find the largest `max_length` and the largest known model that fit, too.

    Raises:
        InputError: a setting, the model or the device's name is wrong. A run that does not fit is no error: see `fits`.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    config, note = find_config(resolved.model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and resolved.data.max_length > limit:
        resolved = changed(resolved, "data", max_length=limit)
    device = named_profile(profile) if profile else profile_of(detect_device(resolved.model.device))
    batches, why_not = read_batches(resolved)
    made = make_plan(resolved, config, device, batches, also=("levels", *(("largest",) if largest else ())))
    return replace(made, notes=tuple(n for n in (note, why_not, *made.notes) if n))


def read_batches(recipe: Recipe) -> tuple[Batches | None, str | None]:
    """The batches that the recipe's rows make, or why they cannot be read."""
    if not recipe.data.dataset_name:
        return None, None
    try:
        tokenizer, _ = find_tokenizer(recipe.model)
        prepared = examine_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed)
    except NybbleError as error:
        return None, f"the rows cannot be read: {error}"
    if not len(prepared.train):
        return None, f"the rows cannot be used: {prepared.fault}"
    return Batches.of(prepared, packs_of(prepared.train, recipe.data), recipe), None


def make_plan(
    recipe: Recipe,
    config: Any,
    profile: Profile,
    batches: Batches | None = None,
    *,
    micro_batch: int | None = None,
    n_shards: int = 1,
    also: Collection[str] = (),
) -> Plan:
    """What `recipe` does and takes on a device, and the neutral settings that run fastest within its budget.

    Args:
        recipe: the run; its memory budget bounds the plan, else the profile's memory.
        config: transformers' config of the model.
        profile: the device.
        batches: what meets in a batch; default: every row has max_length.
        micro_batch: rows at a time, where that is settled already.
        n_shards: processes that share the model; `recipe` and `batches` are the share of one.
        also: "levels", what the longest batch takes at every memory saver level; "largest", see `plan`.

    Raises:
        ModelError: no model can be built of the config, or nothing in it would be trained.
    """
    training, known = recipe.training, batches or Batches.full(recipe)
    budget = training.memory_budget or profile.memory_bytes
    if not profile.is_estimate:
        budget = min(budget, profile.memory_bytes)
    dtype, _notes = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, profile)
    setting = TracedModel(config, recipe, dtype, profile.rounding, profile.shares_memory, n_shards)
    forecast, notes = _forecast(setting, known, profile)
    if known.n_rows is None:
        notes.append(f"rows are not known: every row is taken as {recipe.data.max_length:,} tokens")
    size = training.per_device_train_batch_size
    choice = choose(forecast, budget, size // micro_batch if micro_batch else None)
    made = _plan_of(choice, budget)
    return replace(
        made,
        rows=known.n_rows or 0,
        cheapest_changes=() if choice.fits else cheapest_changes(forecast, budget),
        rungs=plan_levels(choice) if "levels" in also else (),
        largest_length=largest_length(forecast, budget) if "largest" in also else None,
        largest_model=largest_model(forecast, budget) if "largest" in also else None,
        notes=tuple(notes),
    )


def _plan_of(choice: ChosenSettings, budget: int) -> Plan:
    setting = choice.forecast.setting
    training = setting.recipe.training
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    trainable, total = setting.parameters
    steps, seconds = choice.forecast.steps, choice.seconds * accumulated
    return Plan(
        rows=0,
        rows_per_step=size * accumulated,
        optimizer_steps=steps,
        gradient_checkpointing=training.gradient_checkpointing,
        device=asdict(choice.forecast.profile),
        budget_bytes=budget,
        fits=choice.fits,
        phases=choice.phases,
        recompute_layers=choice.depths[0],
        recompute_layers_longest=choice.depths[1],
        n_layers=setting.n_layers,
        lean=choice.savers,
        host_bytes=choice.host_bytes,
        micro_batch=-(-size // choice.n_parts),
        eval_batch=choice.eval_rows,
        flops_per_step=choice.flops * accumulated,
        step_seconds=seconds,
        total_seconds=seconds * steps if steps else None,
        trainable_parameters=trainable,
        total_parameters=total,
        step_memory=choice.forecast.step_memory(budget, choice.longest_level),
    )


def _forecast(setting: TracedModel, batches: Batches, profile: Profile) -> tuple[Forecast, list[str]]:
    """By tracing, or by the formula and why.

    Raises:
        ModelError: the model cannot even be built, or nothing of it would be trained.
    """
    faults = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, NotImplementedError)
    try:
        trainable, _ = setting.parameters
    except faults as error:
        raise ModelError(f"no model can be built of this config: {_line(error)}") from error
    if not trainable:
        raise ModelError("nothing of this model would be trained; check target_modules")
    forecast = Forecast(setting, batches, profile)
    try:
        forecast.average.steady(0)
    except faults as error:
        note = f"{setting.config.model_type} cannot be traced ({_line(error)}): counted by a formula, good to a quarter"
        return replace(forecast, traced=False), [note]
    return forecast, []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
