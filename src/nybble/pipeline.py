"""The sentence: recipe -> plan -> load -> attach adapters -> rows -> train -> evaluate -> report.

Verbs of the command line are functions here with the same name and arguments; what is done with a finished run (merge,
export, ask, chat) lies in `nybble.exporting` and `nybble.generation`. Start reading at `train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from nybble import bundled
from nybble.data import (
    Ledger,
    ShownRow,
    examine_rows,
    rows_cache,
    show_rows,
)
from nybble.errors import RecipeError
from nybble.job import Job, check_shared, prepare, prepare_all
from nybble.kernels import dispatcher
from nybble.loading import load_for_training
from nybble.models import (
    find_tokenizer,
    push_folder,
    save_adapter,
    trained_parameters,
    write_note,
)
from nybble.recipe import Recipe, in_micro_batches, load_recipe, refusal, save_recipe, shared_among, within_context
from nybble.reporting import model_card, rewrite_report, write_report
from nybble.run.directory import RunDirectory
from nybble.run.record import Observer, RunRecord, Silent
from nybble.run.rendezvous import joined
from nybble.storage.atomic import atomic_folder, write_text
from nybble.training import (
    HeldOut,
    Judge,
    Probe,
    Witness,
    evaluate,
    generate_answers,
    probe_rates,
    refused_writes,
    sample_answers,
    train_model,
)

OnExisting = Literal["refuse", "overwrite", "resume", "resume_if_any"]


def train(
    recipe: Recipe | Path | str,
    overrides: Mapping[str, Any] | None = None,
    *,
    on_existing: OnExisting = "refuse",
    force: bool = False,
    observer: Observer | None = None,
) -> RunRecord:
    """Fine-tune a model and write everything into output_dir.

    Started by a launcher such as torchrun, each process trains on its share of every step; only the first one writes
    and reports to the observer.

    Args:
        recipe: a Recipe, or a YAML file with `overrides` on top.
        overrides: settings by name.
        on_existing: what to do if output_dir is not empty. "refuse" raises an InputError. "overwrite" replaces an
            earlier run. "resume" continues from its newest undamaged checkpoint, or starts over if it has none yet.
            "resume_if_any" resumes if output_dir holds a run, and otherwise starts one.
        force: start even if the plan says that the run does not fit, and resume even if what the run learns from has
            changed.
        observer: is told about the progress.

    Raises:
        InputError, CannotRunError, StoppedError: see `nybble.errors`; nothing is written before model, tokenizer and
            rows are known to be usable.
    """
    if on_existing not in get_args(OnExisting):
        raise RecipeError(f"on_existing: got {on_existing!r}; allowed: {', '.join(get_args(OnExisting))}")
    resolved = _as_recipe(recipe, overrides)
    with joined(resolved.model.device == "cpu") as processes:
        run = RunDirectory(Path(resolved.training.output_dir).expanduser())
        if processes.have_begun(str(run.path)):  # the first start alone may overwrite
            on_existing = "resume_if_any" if on_existing != "resume" else "resume"
        overwrite = on_existing == "overwrite"
        resume = on_existing == "resume" or (on_existing == "resume_if_any" and processes.gather(run.holds_run)[0])
        watch = (observer if processes.is_main else None) or Silent()
        return _train_job(prepare_all(resolved, overwrite, resume, force, watch, processes), overwrite, resume, force)


def _train_job(job: Job, overwrite: bool, resume: bool, force: bool) -> RunRecord:
    if not (job.plan.fits or force):
        raise refusal(job.plan)
    with job.run.held(), refused_writes(job.checkpointing.parents):
        with job.processes.together():
            job.run.create(overwrite=overwrite or (resume and job.checkpointing.resumed is None))
        settings = dispatcher.torch_settings(job.device.torch_device)
        with settings, Witness(job.run, job.recipe, job.device, job.prepared, job.plan, job.processes) as witness:
            check_shared(job.run, job.processes)
            job.processes.note_begun(str(job.run.path))
            if job.processes.is_main:
                _write_down(job)
            model, dtype = load_for_training(job, witness)
            base_answers = _evaluate_base(job, witness, model, dtype)
            _train(job, witness, model, dtype, base_answers)
            _evaluate_tuned(job, witness, model, dtype, base_answers)
            _save(job, witness, model)
        if job.processes.is_main:
            job.watch.stage("report")
            write_report(job.run.path)
            job.run.write_manifest()
    training = job.recipe.training
    if training.push_to_hub and training.hub_model_id and job.processes.is_main:
        job.watch.note(f"uploaded to {push_folder(job.weights, training.hub_model_id)}")
    return witness.record


def _write_down(job: Job) -> None:
    write_text(job.run.path / "recipe.yaml", save_recipe(job.recipe))
    nothing = job.prepared.train[:0]
    learned = replace(job.prepared, held_out=nothing, dropped=nothing)
    job.run.write_mask([asdict(row) for row in show_rows(learned, job.tokenizer, 3)])


def _evaluate_base(job: Job, witness: Witness, model: Any, dtype: torch.dtype) -> list[str]:
    job.watch.stage("evaluate base")
    section = job.evaluation
    with witness.phase("evaluate_base"):
        witness.record.evaluation_base = evaluate(
            model, job.tokenizer, job.prepared.held_out, section, dtype, job.processes
        )
        prompts = [example.prompt_ids for example in job.shown]
        return generate_answers(model, job.tokenizer, prompts, section, dtype, job.processes)


def _train(job: Job, witness: Witness, model: Any, dtype: torch.dtype, base_answers: Sequence[str]) -> None:
    training = in_micro_batches(shared_among(job.recipe.training, job.processes.count), job.plan.micro_batch)
    if training.learning_rate == "probe":
        training = training.model_copy(update={"learning_rate": _probe(job, witness, model, dtype).learning_rate})
    job.watch.stage("train")
    before = sum(phase.seconds for phase in witness.record.phases.values())
    with witness.phase("train"):
        result = train_model(
            model,
            job.tokenizer,
            job.groups,
            training,
            run=job.run,
            device=job.device,
            compute_dtype=dtype,
            max_steps=job.plan.optimizer_steps,
            observer=job.watch,
            held_out=_held_out(job, base_answers),
            eval_steps=job.recipe.evaluation.eval_steps,
            step_memory=job.plan.step_memory,
            checkpointing=job.checkpointing,
            deadline=job.deadline,
            processes=job.processes,
        )
    witness.phase_peak("train", result.peak_bytes)
    witness.record.notes += result.notes
    witness.record.train_loss, witness.record.skipped_steps = result.train_loss, result.skipped_steps
    witness.record.tokens_per_second = result.tokens_per_second
    witness.record.seconds_to_first_step = before + (result.seconds_to_first_step or 0.0)


def _held_out(job: Job, base_answers: Sequence[str]) -> HeldOut | None:
    if not job.prepared.held_out:
        return None
    return HeldOut(job.prepared.held_out, job.evaluation, job.shown, base_answers)


def _probe(job: Job, witness: Witness, model: Any, dtype: torch.dtype) -> Probe:
    job.watch.stage("probe")
    section, rows = job.evaluation, job.prepared.held_out
    judge = Judge(job.recipe.method, rows, lambda r: evaluate(model, job.tokenizer, r, section, dtype))
    with witness.phase("probe"):
        found = probe_rates(
            model,
            job.tokenizer,
            job.groups,
            job.recipe.training,
            judge,
            run=job.run,
            device=job.device,
            compute_dtype=dtype,
            max_steps=job.plan.optimizer_steps,
            is_resumed=job.checkpointing.resumed is not None,
            observer=job.watch,
            step_memory=job.plan.step_memory,
            deadline=job.deadline,
        )
    job.watch.note(found.in_words)
    witness.record.notes.append(found.in_words)
    witness.record.probe = asdict(found)
    return found


def _evaluate_tuned(job: Job, witness: Witness, model: Any, dtype: torch.dtype, base_answers: Sequence[str]) -> None:
    job.watch.stage("evaluate")
    if job.recipe.method == "full":
        model.to(dtype)  # what is saved is what is measured
    with witness.phase("evaluate"):
        tuned = evaluate(model, job.tokenizer, job.prepared.held_out, job.evaluation, dtype, job.processes)
        shown = HeldOut(job.prepared.held_out, job.evaluation, job.shown, base_answers)
        for sample in sample_answers(model, job.tokenizer, shown, dtype, job.processes):
            job.run.append_sample(sample)
    if tuned and witness.record.evaluation_base:
        job.run.write_held_out(witness.record.evaluation_base, tuned)
    witness.record.evaluation_tuned = tuned
    witness.record.eval_loss = tuned.loss if tuned else None


def _save(job: Job, witness: Witness, model: Any) -> None:
    job.watch.stage("save")
    with witness.phase("save"):
        trained = trained_parameters(model)  # which all processes ask for
        if not job.processes.is_main:
            return
        with atomic_folder(job.weights) as folder:
            if job.recipe.method == "full":
                model.save_pretrained(folder)
            else:
                save_adapter(model, folder, trained)
            job.tokenizer.save_pretrained(folder)
            write_note(folder, job.recipe, witness.record.rows["ledger"], witness.record.model)
            write_text(folder / "README.md", model_card(witness.record.to_json()))  # PEFT's own is a form to fill in


@dataclass(frozen=True)
class Inspection:
    """What `inspect_rows` found."""

    source: str
    ledger: Ledger
    rows: list[ShownRow]
    fault: str | None  # why `train` would refuse the rows


def inspect_rows(
    recipe: Recipe | Path | str | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    show: int = 5,
    find: str = "",
    observer: Observer | None = None,
) -> Inspection:
    """The ledger of a recipe's rows, and `show` of them (that contain `find`) with what is learned in them.

    Nothing is trained and no weights are read: a folder that holds only a tokenizer will do.

    Raises:
        InputError: tokenizer or rows cannot be used.
    """
    resolved, watch = _as_recipe(recipe, overrides), observer or Silent()
    tokenizer, context = find_tokenizer(resolved.model)
    resolved = within_context(resolved, context, watch.note)
    prepared = examine_rows(
        resolved.data, resolved.evaluation, tokenizer, resolved.training.seed, rows_cache(resolved.quantization), watch
    )
    shown = show_rows(prepared, tokenizer, show, find)
    return Inspection(resolved.data.dataset_name, prepared.ledger, shown, prepared.fault)


def probe(
    recipe: Recipe | Path | str | None, overrides: Mapping[str, Any] | None = None, *, observer: Observer | None = None
) -> Probe:
    """The learning rate that `training.learning_rate: probe` would choose, with its curve; nothing is kept.

    Raises:
        InputError, CannotRunError, StoppedError: as `train`; RecipeError where the run is too short to probe.
    """
    resolved = _as_recipe(recipe, overrides)
    with TemporaryDirectory() as folder:
        training = resolved.training.model_copy(update={"output_dir": folder})
        job = prepare(resolved.model_copy(update={"training": training}), False, False, False, observer or Silent())
        settings = dispatcher.torch_settings(job.device.torch_device)
        with settings, Witness(job.run, job.recipe, job.device, job.prepared, job.plan) as witness:
            model, dtype = load_for_training(job, witness)
            return _probe(job, witness, model, dtype)


def rehearse(recipe: Recipe, *, resume: bool = False, observer: Observer | None = None) -> RunRecord:
    """The training of a run alone: nothing is measured on held-out rows, and only checkpoints are left.

    Raises:
        InputError, CannotRunError, StoppedError: as `train`.
    """
    job = prepare(recipe, False, resume, False, observer or Silent())
    settings = dispatcher.torch_settings(job.device.torch_device)
    with settings, job.run.held(), Witness(job.run, job.recipe, job.device, job.prepared, job.plan) as witness:
        model, dtype = load_for_training(job, witness)
        _train(job, witness, model, dtype, [])
    return witness.record


def demo(
    output_dir: Path | str = "runs/demo",
    overrides: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
    observer: Observer | None = None,
) -> RunRecord:
    """The whole story on the bundled base and rows, offline."""
    values = {
        "model_name_or_path": str(bundled.base_path()),
        "dataset_name": str(bundled.train_rows_path()),
        "eval_dataset_name": str(bundled.heldout_rows_path()),
        "output_dir": str(output_dir),
        **(overrides or {}),
    }
    former = (Path(output_dir) / "run.json").is_file()
    on_existing: OnExisting = "overwrite" if overwrite and former else "refuse"
    return train(bundled.recipe_path(), overrides=values, on_existing=on_existing, observer=observer)


def report(run_dir: Path | str) -> Path:
    """Write report.html, report.md and report.json of a run or comparison anew from what lies on disk."""
    return rewrite_report(Path(run_dir))


def _as_recipe(recipe: Recipe | Path | str | None, overrides: Mapping[str, Any] | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError("overrides go with a recipe file; a Recipe is already resolved")
    return recipe
