"""What a run works on: found, checked and planned before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nybble.checkpoints import list_checkpoints
from nybble.data import Example, Groups, Prepared, packs_of, prepare_rows, rows_cache
from nybble.diagnostics import settle
from nybble.hardware import Device, detect_device
from nybble.models import ModelSource, find_model, hash_of, load_tokenizer
from nybble.planning import Batches, plan_training
from nybble.recipe import Plan, Recipe, within_context
from nybble.runs import Observer, RunDirectory
from nybble.training import Checkpointing, check_training, checkpointing, find_checkpoint, folders_of, identify


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

    @property
    def weights(self) -> Path:
        """Where the trained weights go."""
        return self.run.full_model if self.recipe.method == "full" else self.run.adapter

    @property
    def shown(self) -> list[Example]:
        """The held-out rows whose answers are shown."""
        asked = [example for example in self.prepared.held_out if example.prompt_ids]
        return asked[: self.recipe.evaluation.n_samples]


def prepare(recipe: Recipe, overwrite: bool, resume: bool, force: bool, watch: Observer) -> Job:
    """Find and check all that a run needs; nothing is written.

    Raises:
        InputError, CannotRunError: what is missing or does not go together.
    """
    limit, began, output = recipe.training.max_seconds, time.monotonic(), recipe.training.output_dir
    parents = folders_of(Path(output).expanduser(), recipe.training)
    elsewhere = resume and bool(list_checkpoints(parents[1:]))
    run = RunDirectory.check(output, overwrite=overwrite, resume=resume, elsewhere=elsewhere)
    check_training(recipe.training)
    found = find_checkpoint(parents, watch.note) if resume else None
    if resume and found is None:
        watch.note("no checkpoint was written yet: the run begins anew")
    device = detect_device(recipe.model.device)
    settle(device, recipe.model.paths, recipe.training.optim, watch.note)
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
    batches = Batches.of(prepared, packs, recipe)
    plan = plan_training(recipe, source.config, device, batches, found.micro_batch if found else None)
    for line in (*plan.lines(), *plan.notes):
        watch.note(line)
    identity = partial(identify, recipe, source.folder, tokenizer, prepared, hash_of(recipe.quantization))
    saving = checkpointing(recipe, parents, identity, found, force, watch.note)
    groups, deadline = Groups(prepared.train, packs), began + limit if limit else None
    return Job(recipe, run, device, source, tokenizer, prepared, groups, plan, saving, deadline, watch)
