"""The first stage of a run: everything that it needs is found, checked and planned before anything is written.

`open_run` finds the place (folder, device, processes) and `prepare` what the run works on (model, rows, plan, and the
checkpoint that it continues from). A mistake in the input therefore costs seconds and leaves nothing behind.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from nybble.data import Example, Groups, Prepared, fixed_clock, packs_of, prepare_rows, rows_cache
from nybble.diagnostics import choose_backends
from nybble.errors import InputError, RecipeError
from nybble.hardware import detect_device
from nybble.models import (
    ModelSource,
    NewTokens,
    add_new_tokens,
    check_adapter_base,
    find_model,
    for_shards,
    hash_of,
    load_tokenizer,
    shards_among,
    take_over_adapter,
)
from nybble.planning import Batches, among, plan_training, profile_of, share_of
from nybble.recipe import EvaluationSection, Plan, Recipe, for_one_process, rows_per_step, step_in_words, within_context
from nybble.run.context import OnExisting, RunContext
from nybble.run.directory import RunDirectory, clock_of, read_record
from nybble.run.processes import Processes
from nybble.run.record import Observer
from nybble.storage.atomic import sha256_of
from nybble.storage.checkpoints import list_checkpoints
from nybble.training import (
    Checkpointing,
    check_best_step,
    check_optimizer_and_schedule,
    checkpointing,
    find_checkpoint,
    folders_of,
    identify,
    software_versions,
    tracker_names,
)

_SECONDS_UNTIL_VISIBLE = 5  # a shared folder may show a new file late


@dataclass(frozen=True)
class RunInputs:
    """What a run works on, known to be usable before anything is written."""

    recipe: Recipe  # without what the model or the number of processes does not allow
    source: ModelSource
    tokenizer: Any
    tokens: NewTokens  # whose rows are learned
    rows: Prepared
    groups: Groups
    plan: Plan
    checkpointing: Checkpointing

    @property
    def evaluation(self) -> EvaluationSection:
        """The recipe's section, with as many rows at a time as fit."""
        return self.recipe.evaluation.model_copy(update={"per_device_eval_batch_size": self.plan.eval_batch})

    @property
    def shown(self) -> list[Example]:
        """The held-out rows whose answers are shown."""
        with_prompt = [example for example in self.rows.held_out if example.prompt_ids]
        return with_prompt[: self.recipe.evaluation.n_samples]


def open_run(
    recipe: Recipe,
    *,
    on_existing: OnExisting = "refuse",
    force: bool = False,
    observer: Observer,
    processes: Processes = Processes(),  # noqa: B008 - a value
) -> RunContext:
    """Check the settings, and find the run's directory and device. Nothing is written.

    Raises:
        InputError: settings do not go together, the directory may not be used, or the processes were started with
            different settings or versions.
        CannotRunError: the device or a library is missing.
    """
    started = time.monotonic()
    path = Path(recipe.training.output_dir).expanduser()
    if processes.have_begun(str(path)):  # only the first start of a launcher may overwrite
        on_existing = "resume" if on_existing == "resume" else "resume_if_any"
    if on_existing == "resume_if_any":
        on_existing = "resume" if processes.gather(RunDirectory(path).holds_run)[0] else "refuse"
    versions = {f"the version of {name}": version for name, version in software_versions().items()}
    settings = {f"setting {name}": value for name, value in _flat(recipe.model_dump(mode="json")).items()}
    processes.agree({**versions, **settings, "on_existing": on_existing, "--force": force})
    with processes.together():
        fit_to_processes(recipe, processes)  # or refuse before anything is read
        resumes = on_existing == "resume"
        directory = RunDirectory.check(
            path,
            overwrite=on_existing == "overwrite",
            resume=resumes,
            elsewhere=resumes and bool(list_checkpoints(folders_of(path, recipe.training)[1:])),
            writes=processes.is_main,
        )
        check_optimizer_and_schedule(recipe.training)
        check_best_step(recipe.evaluation, recipe.training)
        tracker_names(recipe.training)
        device = detect_device(recipe.model.device)
    if device.among_others and not processes.are_many:
        observer.note(device.among_others)
    if resumes and directory.holds_run and read_record(path)["status"] == "killed":
        observer.note(f"the process that trained {path} ended without a word: it was killed, or the machine went down")
    limit = recipe.training.max_seconds
    clock = processes.gather(_clock(directory, resumes=resumes))[0]
    return RunContext(
        directory=directory,
        device=device,
        processes=processes,
        observer=observer,
        on_existing=on_existing,
        clock=clock,
        deadline=started + limit if limit else None,
    )


def _clock(directory: RunDirectory, *, resumes: bool) -> datetime:
    """The time that chat templates are told: a resumed run's rows have the date on which it began."""
    began = clock_of(read_record(directory.path)) if resumes and directory.holds_run else None
    return began or datetime.now().replace(microsecond=0)


def trains_in_shards(recipe: Recipe, processes: Processes) -> bool:
    """Whether no process has the whole model."""
    return processes.are_many and recipe.training.distributed == "fsdp"


def fit_to_processes(recipe: Recipe, processes: Processes) -> Recipe:
    """The recipe as this number of processes can follow it.

    Raises:
        RecipeError: train_batch_size cannot be divided among the processes, or a setting works only in one process or
            unsharded.
    """
    if processes.are_many and ":" in recipe.model.device:
        raise RecipeError(
            f"device {recipe.model.device} is for one process, and {processes.count} were started, which take one GPU "
            "each: use --device cuda, and HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES to say which"
        )
    for_one_process(recipe.training, processes.count)
    shards_among(recipe.training, processes.count)
    if processes.are_many and recipe.training.learning_rate == "probe":
        raise RecipeError(
            "learning_rate: probe works in one process; run `nybble probe` first and set the rate that it finds"
        )
    return for_shards(recipe) if trains_in_shards(recipe, processes) else recipe


def prepare(recipe: Recipe, run: RunContext, *, force: bool = False) -> RunInputs:
    """Find and check all that the run works on. Nothing is written.

    The first process of each machine fills the caches and the others read them.

    Raises:
        InputError, CannotRunError: something is missing or does not go together, in any of the processes.
    """
    processes = run.processes
    with processes.together():
        inputs = _prepare(recipe, run, force=force) if processes.local_rank == 0 else None
    with processes.together():
        inputs = inputs or _prepare(recipe, run, force=force)
    # Free memory differs between processes, and those that split a batch differently would not meet in a step.
    plans = processes.gather(inputs.plan)
    inputs = replace(inputs, plan=min(plans, key=lambda plan: (plan.fits, plan.micro_batch, plan.eval_batch)))
    resumed = inputs.checkpointing.resumed
    name = resumed.path.name if resumed else None
    processes.agree({"the rows' hash": inputs.rows.fingerprint, "the checkpoint": name})
    return inputs


def _prepare(recipe: Recipe, run: RunContext, *, force: bool) -> RunInputs:
    note = run.observer.note
    count = run.processes.count
    recipe = fit_to_processes(take_over_adapter(recipe), run.processes)
    parents = folders_of(run.directory.path, recipe.training)
    checkpoint = find_checkpoint(parents, note) if run.resumes else None
    if run.resumes and checkpoint is None:
        note("no checkpoint found; starting from step 0")
    choose_backends(run.device, recipe.model.paths, recipe.training.optim, note)

    for name in recipe.preferences.unused:
        note(f"{name} is not used under objective: {recipe.preferences.objective}")

    run.observer.stage("rows")
    source = find_model(recipe.model)
    for line in check_adapter_base(recipe, source):
        note(line)
    tokenizer = load_tokenizer(source, recipe.model)
    tokens = add_new_tokens(tokenizer, recipe.lora.new_tokens)
    if tokens.ids:
        known = sum(token < tokens.n_known for token in tokens.ids)
        note(f"rows of {len(tokens.ids)} tokens are learned; {known} of them were in the vocabulary")
    context = getattr(source.text_config, "max_position_embeddings", None)
    recipe = within_context(recipe, context, note)
    cache = rows_cache(recipe.quantization)
    with fixed_clock(run.clock):
        seed, objective = recipe.training.seed, recipe.preferences.objective
        rows = prepare_rows(recipe.data, recipe.evaluation, tokenizer, seed, cache, run.observer, objective)
    rows = replace(rows, ledger=replace(rows.ledger, context=context))
    for line in rows.ledger.in_words:
        note(line)
    check_best_step(recipe.evaluation, recipe.training, rows)
    packs = packs_of(rows.train, recipe.data)

    run.observer.stage("plan")
    share = share_of(recipe, count)
    plan = plan_training(
        share,
        _config_before(source.config, tokens),
        profile_of(run.device, run.processes.beside_on(run.device.type)),
        among(Batches.of(rows, packs, share), count),
        checkpoint.micro_batch if checkpoint else None,
        shards_among(recipe.training, count),
    )
    plan = replace(
        plan,
        rows=len(packs or rows.train),
        rows_per_step=rows_per_step(recipe.training, count),
        step_rule=step_in_words(recipe.training, count),
    )
    for line in (*plan.lines(), *plan.notes):
        note(line)

    hasher = hash_of(recipe.quantization)
    identity = partial(identify, recipe, source.folder, tokenizer, rows, hasher, n_processes=count)
    return RunInputs(
        recipe=recipe,
        source=source,
        tokenizer=tokenizer,
        tokens=tokens,
        rows=rows,
        groups=Groups(rows.train, packs),
        plan=plan,
        checkpointing=checkpointing(recipe, parents, identity, checkpoint, force, note),
    )


def _config_before(config: Any, tokens: NewTokens) -> Any:
    """The config to which a plan adds the rows of `tokens`: they may have places already that no token takes."""
    n_rows = max(config.get_text_config().vocab_size, tokens.n_embeddings)
    before = copy.deepcopy(config)
    before.get_text_config().vocab_size = n_rows - len(tokens.ids)
    return before


def check_directory_is_shared(run: RunContext) -> None:
    """Check that every process sees the run.json that the first one wrote: each of them reads what a run resumes from.

    Raises:
        InputError: one of them does not.
    """
    file = run.directory.path / "run.json"
    written = run.processes.gather(sha256_of(file) if run.processes.is_main else None)[0]
    deadline = time.monotonic() + _SECONDS_UNTIL_VISIBLE
    with run.processes.together():
        while not (file.is_file() and sha256_of(file) == written):
            if time.monotonic() > deadline:
                raise InputError(
                    f"output_dir {run.directory.path.absolute()} is not the folder that process 0 writes to; give a "
                    "folder that all machines share"
                )
            time.sleep(0.2)


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings as `section.name: value`."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": setting for inner, setting in value.items()}
        else:
            flat[name] = value
    return flat
