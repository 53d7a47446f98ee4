"""What a run works on: found, checked and planned before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nybble.data import Example, Groups, Prepared, packs_of, prepare_rows, rows_cache
from nybble.diagnostics import choose_backends
from nybble.errors import InputError, RecipeError
from nybble.hardware import Device, detect_device
from nybble.models import ModelSource, find_model, for_shards, hash_of, load_tokenizer, shards_among
from nybble.planning import Batches, among, plan_training, profile_of, share_of
from nybble.recipe import EvaluationSection, Plan, Recipe, shared_among, step_rows, within_context
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer
from nybble.storage.atomic import sha256_of
from nybble.storage.checkpoints import list_checkpoints
from nybble.training import (
    Checkpointing,
    check_optimizer_and_schedule,
    checkpointing,
    find_checkpoint,
    folders_of,
    identify,
    software_versions,
    tracker_names,
)

_SECONDS_TO_APPEAR = 5  # a shared folder may show a new file late


def check_shared(run: RunDirectory, processes: Processes) -> None:
    """All processes must see the run.json that the first one wrote: a resumed run is read by each.

    Raises:
        InputError: one does not.
    """
    file = run.path / "run.json"
    hashes = processes.gather(sha256_of(file) if processes.is_main else None)
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    with processes.together():
        while not (file.is_file() and sha256_of(file) == hashes[0]):
            if time.monotonic() > deadline:
                raise InputError(
                    f"output_dir {run.path.absolute()} is not the folder that process 0 writes to; give a folder that "
                    "all machines share"
                )
            time.sleep(0.2)


@dataclass(frozen=True)
class Job:
    """What a run works on, known to be usable before anything is written."""

    recipe: Recipe
    run: RunDirectory
    device: Device
    source: ModelSource
    tokenizer: Any
    prepared: Prepared
    groups: Groups
    plan: Plan
    checkpointing: Checkpointing
    deadline: float | None  # by the monotonic clock
    watch: Observer
    processes: Processes = Processes()  # noqa: RUF009 - a value

    @property
    def in_shards(self) -> bool:
        """Whether no process holds the whole model."""
        return self.processes.are_many and self.recipe.training.distributed == "fsdp"

    @property
    def weights(self) -> Path:
        """Where the trained weights go."""
        return self.run.full_model if self.recipe.method == "full" else self.run.adapter

    @property
    def evaluation(self) -> EvaluationSection:
        """The recipe's, with as many rows at a time as fit."""
        return self.recipe.evaluation.model_copy(update={"per_device_eval_batch_size": self.plan.eval_batch})

    @property
    def shown(self) -> list[Example]:
        """The held-out rows whose answers are shown."""
        asked = [example for example in self.prepared.held_out if example.prompt_ids]
        return asked[: self.recipe.evaluation.n_samples]


def prepare_all(
    recipe: Recipe, overwrite: bool, resume: bool, force: bool, watch: Observer, processes: Processes
) -> Job:
    """`prepare` in each process: the first of a machine fills the caches, the others read them.

    Raises:
        InputError, CannotRunError: as `prepare`, in all of them; recipes, versions, rows or checkpoints differ.
    """
    library_versions = {f"the version of {name}": there for name, there in software_versions().items()}
    settings = {f"setting {name}": value for name, value in _settings(recipe).items()}
    processes.agree({**library_versions, **settings, "--resume": resume, "--overwrite": overwrite, "--force": force})
    made: list[Job] = []
    for are_first in (True, False):
        with processes.together():
            if are_first == (processes.local_rank == 0):
                made.append(prepare(recipe, overwrite, resume, force, watch, processes))
    # Free memory differs; what is split in another way would not meet in the same step.
    plans = processes.gather(made[0].plan)
    job = replace(made[0], plan=min(plans, key=lambda plan: (plan.fits, plan.micro_batch, plan.eval_batch)))
    found = job.checkpointing.resumed
    processes.agree({"the rows' hash": job.prepared.fingerprint, "the checkpoint": found.path.name if found else None})
    return job


def _settings(recipe: Recipe) -> dict[str, Any]:
    sections = recipe.model_dump(mode="json")
    inner = {k: v for k, v in sections.items() if isinstance(v, dict)}
    flat = {f"{section}.{name}": value for section, values in inner.items() for name, value in values.items()}
    return {**flat, **{k: v for k, v in sections.items() if k not in inner}}


def prepare(
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    force: bool,
    watch: Observer,
    processes: Processes = Processes(),  # noqa: B008 - a value
) -> Job:
    """Find and check all that a run needs; nothing is written.

    Raises:
        InputError, CannotRunError: what is missing or does not go together.
    """
    shared_among(recipe.training, processes.count)  # or refuse at once
    shards_among(recipe.training, processes.count)
    if processes.are_many and recipe.training.learning_rate == "probe":
        raise RecipeError("learning_rate: probe works in one process; run `nybble probe` first and give the rate found")
    if processes.are_many and recipe.training.distributed == "fsdp":
        recipe = for_shards(recipe)
    limit, began, output = recipe.training.max_seconds, time.monotonic(), recipe.training.output_dir
    parents = folders_of(Path(output).expanduser(), recipe.training)
    elsewhere = resume and bool(list_checkpoints(parents[1:]))
    run = RunDirectory.check(output, overwrite=overwrite, resume=resume, elsewhere=elsewhere, writes=processes.is_main)
    check_optimizer_and_schedule(recipe.training)
    tracker_names(recipe.training)
    found = find_checkpoint(parents, watch.note) if resume else None
    if resume and found is None:
        watch.note("no checkpoint was written yet: the run begins anew")
    device = detect_device(recipe.model.device)
    choose_backends(device, recipe.model.paths, recipe.training.optim, watch.note)
    watch.stage("rows")
    source = find_model(recipe.model)
    tokenizer = load_tokenizer(source, recipe.model)
    recipe = within_context(recipe, getattr(source.config, "max_position_embeddings", None), watch.note)
    prepared = prepare_rows(
        recipe.data, recipe.evaluation, tokenizer, recipe.training.seed, rows_cache(recipe.quantization), watch
    )
    for line in prepared.ledger.in_words:
        watch.note(line)
    packs = packs_of(prepared.train, recipe.data)
    watch.stage("plan")
    ours = share_of(recipe, processes.count)
    batches = among(Batches.of(prepared, packs, ours), processes.count)
    n_shards = shards_among(recipe.training, processes.count)
    profile = profile_of(device, processes.beside_on(device.type))
    plan = plan_training(ours, source.config, profile, batches, found.micro_batch if found else None, n_shards)
    plan = replace(plan, rows=len(packs or prepared.train), rows_per_step=step_rows(recipe.training))
    for line in (*plan.lines(), *plan.notes):
        watch.note(line)
    identity = partial(identify, recipe, source.folder, tokenizer, prepared, hash_of(recipe.quantization))
    saving = checkpointing(recipe, parents, identity, found, force, watch.note)
    groups, deadline = Groups(prepared.train, packs), began + limit if limit else None
    return Job(recipe, run, device, source, tokenizer, prepared, groups, plan, saving, deadline, watch, processes)
