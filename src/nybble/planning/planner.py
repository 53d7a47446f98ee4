"""The plan of a run, made from its recipe, its model's config, its rows and a device profile.

The plan predicts what every phase of the run takes, and chooses the fastest settings within the budget that leave
unchanged what is learned. It is made in four steps, each of them a module:

1. **Trace** (`traced_step`, `memory_tracer`). The code that trains runs on fake tensors, which have shapes but no
   memory: transformers' model with our blocks, PEFT's adapters, the loss, the backward pass, clipping, AdamW. Every
   storage is counted from the operator that makes it until nothing refers to it. A step falls into sections (a layer's
   forward pass, the loss, a layer's backward pass, ..), and the highest moment of each is kept.
2. **Extrapolate** (`extrapolate`). Decoder layers are alike, so at a given section the bytes alive are a linear
   function of the number of recomputed layers and of the number of the others. Traces of 2 to 5 layers fix that
   function, and with it the step at every level: levels 0 to n recompute so many of the n layers, and each level beyond
   applies one more memory saver.
3. **Phases** (`phases`). What a step takes, with the device's context and its allocator's loss on top, gives the peak
   of loading, of the first, the average and the longest step, of evaluation, of a checkpoint and of merging.
4. **Search** (`search`). For each split of a batch into micro-batches, the average and the longest batch take the first
   level at which they stay within the budget. The split that is fastest wins, its time predicted from the profile's
   rates (`devices`). Where nothing fits, the search names the changes that would make the run fit.

So a budget becomes a chosen depth on this way: `make_plan`, `search.choose`, `Forecast.level_for`,
`StepAtLevels.steady`, `TracedModel.trace`, `traced_step.run_steps`. The training gets the peaks by tokens and level
(`StepMemory`), and takes the level of each batch from them.

The same recipe, config, batches and profile give the same plan: only `plan` looks at the machine, to find the profile.
`distributed` and `sharded_memory` say what each of several processes takes and sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nybble.data import examine_rows, packs_of
from nybble.errors import ModelError, NybbleError
from nybble.hardware import detect_device
from nybble.models import add_new_tokens, compute_dtype, find_folder, find_tokenizer, read_config, take_over_adapter
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
from nybble.planning.shapes import config_of
from nybble.recipe import (
    ModelSection,
    Plan,
    Recipe,
    RecipeSource,
    for_one_process,
    load_recipe,
    saving_in_words,
    step_in_words,
)
from nybble.recipe.shapes import known_shape, not_known
from nybble.run.quiet import quiet_libraries
from nybble.units import format_bytes


@quiet_libraries()
def plan(
    recipe: RecipeSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    profile: str | None = None,
    largest: bool = False,
) -> Plan:
    """What a run will do and take in every phase, before any weight is read.

    Args:
        recipe: a Recipe, or a YAML file or a mapping of settings, with `overrides` on top. Its model may be a folder, a
            hub id (of which only the small files are fetched) or a known shape such as `llama-2-7b`. Its rows are read
            where they can be.
        overrides: settings by name.
        profile: a device that is not here, by its name in `PROFILES`; default: the recipe's device.
        largest: find the largest `max_length` and the largest known model that fit, too.

    Raises:
        InputError: a setting, the model or the device's name is wrong. A run that does not fit is valid: see `fits`.
    """
    resolved = take_over_adapter(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides))
    config, note = find_config(resolved.model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and resolved.data.max_length > limit:
        resolved = changed(resolved, "data", max_length=limit)
    step_rule = step_in_words(resolved.training, n_processes=1)
    resolved = resolved.model_copy(update={"training": for_one_process(resolved.training, n_processes=1)})
    device = named_profile(profile) if profile else profile_of(detect_device(resolved.model.device))
    batches, why_not = read_batches(resolved)
    result = _search(resolved, config, device, batches)
    made = replace(result.plan(), rungs=plan_levels(result.chosen), step_rule=step_rule)
    if largest:
        made = replace(
            made,
            largest_length=largest_length(result.forecast, result.budget_bytes),
            largest_model=largest_model(result.forecast, result.budget_bytes),
        )
    has = f"which {device.name} has" if device.is_estimate else f"which {device.name} has free now"
    beyond = f"the budget is more than the {format_bytes(device.memory_bytes)} {has}"
    _, on_dtype = compute_dtype(resolved.quantization.bnb_4bit_compute_dtype, device)
    notes = (note, why_not, *on_dtype, beyond if result.budget_bytes > device.memory_bytes else None, *made.notes)
    return replace(made, notes=tuple(n for n in notes if n))


def make_plan(
    recipe: Recipe,
    config: Any,
    profile: Profile,
    batches: Batches | None = None,
    *,
    micro_batch: int | None = None,
    n_shards: int = 1,
) -> Plan:
    """What `recipe` does and takes on a device, and the neutral settings that run fastest within its budget.

    Args:
        recipe: the run; its memory budget bounds the plan, else the profile's memory.
        config: transformers' config of the model.
        profile: the device.
        batches: what meets in a batch; by default every row has max_length.
        micro_batch: rows that go through the model at a time, where that is settled already.
        n_shards: processes that share the model; `recipe` and `batches` are the share of one.

    Raises:
        ModelError: no model can be built of the config, it cannot be traced, or nothing in it would be trained.
    """
    return _search(recipe, config, profile, batches, micro_batch=micro_batch, n_shards=n_shards).plan()


def _search(
    recipe: Recipe,
    config: Any,
    profile: Profile,
    batches: Batches | None,
    *,
    micro_batch: int | None = None,
    n_shards: int = 1,
) -> _Result:
    training = recipe.training
    budget = training.memory_budget or profile.memory_bytes
    dtype, _notes = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, profile)
    setting = TracedModel(config, recipe, dtype, profile.rounding, profile.shares_memory, n_shards)
    forecast = Forecast(setting, batches or Batches.full(recipe), profile)
    _check_traceable(forecast)
    n_parts = training.per_device_train_batch_size // micro_batch if micro_batch else None
    return _Result(forecast, budget, choose(forecast, budget, n_parts))


@dataclass(frozen=True)
class _Result:
    """What was chosen within a budget, and the forecast of the whole batch, which it may have split."""

    forecast: Forecast
    budget_bytes: int
    chosen: ChosenSettings

    def plan(self) -> Plan:
        """The plan of what was chosen."""
        setting = self.forecast.setting
        training = setting.recipe.training
        chosen = self.chosen
        accumulated = training.gradient_accumulation_steps
        batch_rows = training.per_device_train_batch_size
        n_steps = chosen.forecast.steps
        seconds = chosen.seconds * accumulated
        trainable, total = setting.parameters
        n_rows = self.forecast.batches.n_rows
        unknown = f"rows are not known: every row is taken as {setting.recipe.data.max_length:,} tokens"
        return Plan(
            rows=n_rows or 0,
            rows_per_step=batch_rows * accumulated,
            optimizer_steps=n_steps,
            gradient_checkpointing=training.gradient_checkpointing,
            device=asdict(chosen.forecast.profile),
            budget_bytes=self.budget_bytes,
            fits=chosen.fits,
            phases=chosen.phases,
            recompute_layers=chosen.depths[0],
            recompute_layers_longest=chosen.depths[1],
            n_layers=setting.n_layers,
            lean=chosen.savers,
            host_bytes=chosen.host_bytes,
            micro_batch=-(-batch_rows // chosen.n_parts),
            eval_batch=chosen.eval_rows,
            flops_per_step=chosen.flops * accumulated,
            step_seconds=seconds,
            total_seconds=seconds * n_steps if n_steps else None,
            trainable_parameters=trainable,
            total_parameters=total,
            cheapest_changes=() if chosen.fits else cheapest_changes(chosen, self.budget_bytes),
            step_memory=chosen.forecast.step_memory(self.budget_bytes, chosen.longest_level),
            saving_rule=saving_in_words(training),
            notes=tuple(filter(None, (unknown if n_rows is None else None, self.forecast.setting.blocks.reason))),
        )


def _check_traceable(forecast: Forecast) -> None:
    """Refuse a config that no plan can be made of.

    Raises:
        ModelError: the model cannot be built or traced, or nothing of it would be trained.
    """
    faults = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, NotImplementedError)
    try:
        trainable, _total = forecast.setting.parameters
    except faults as error:
        raise ModelError(f"no model can be built of this config: {_line(error)}") from error
    if not trainable:
        raise ModelError("nothing of this model would be trained; check target_modules")
    try:
        forecast.average.steady(0)  # is needed in any case
    except faults as error:
        raise ModelError(
            f"{forecast.setting.config.model_type} cannot be traced ({_line(error)}), so no plan can be made; check "
            "that its config describes a model that runs"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def find_config(model: ModelSection) -> tuple[Any, str | None]:
    """transformers' config of a folder, a known shape or a hub id (only its small files), and a note on where from.

    Raises:
        ModelError: none of these, or a config that lacks what a language model needs.
    """
    name = model.model_name_or_path
    if not name:
        raise ModelError("no model is given; set --model_name_or_path to a folder, a hub id or a known shape")
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
    needed = ("hidden_size", "vocab_size")
    missing = [field for field in needed if not getattr(text, field, None)]
    if missing:
        raise ModelError(f"{folder}/config.json lacks {', '.join(missing)}; it cannot be planned for")
    return config, None


def read_batches(recipe: Recipe) -> tuple[Batches | None, str | None]:
    """The batches that the recipe's rows make, or why they cannot be read."""
    if not recipe.data.dataset_name:
        return None, None
    try:
        tokenizer, _ = find_tokenizer(recipe.model)
        add_new_tokens(tokenizer, recipe.lora.new_tokens)
        objective = recipe.preferences.objective
        prepared = examine_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed, objective=objective)
    except NybbleError as error:
        return None, f"the rows cannot be read: {error}"
    if not len(prepared.train):
        return None, f"the rows cannot be used: {prepared.fault}"
    return Batches.of(prepared, packs_of(prepared.train, recipe.data), recipe), None
