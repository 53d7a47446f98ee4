"""The story of a run: recipe -> rows -> plan -> load (4-bit) -> attach adapters -> train -> evaluate -> save -> report.

Start reading at `train`: its stages are functions below it, in their order, and the training step is on one page in
`nybble.training.loop`. Every verb of the command line is a function with the same name and arguments; what is done
with a finished run (merge, export, ask, chat) is in `nybble.exporting` and `nybble.generation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from nybble import bundled
from nybble.data import Example, Ledger, ShownRow, examine_rows, rows_cache, show_rows
from nybble.errors import InputError, ModelError, RecipeError
from nybble.kernels import dispatcher
from nybble.loading import TrainableModel, load
from nybble.models import (
    add_new_tokens,
    find_tokenizer,
    push_folder,
    save_adapter,
    take_over_adapter,
    trained_parameters,
    write_note,
    write_whole,
)
from nybble.preparation import RunInputs, check_directory_is_shared, open_run, prepare
from nybble.recipe import (
    Recipe,
    RecipeSource,
    for_one_process,
    in_micro_batches,
    load_recipe,
    refusal,
    save_recipe,
    within_context,
)
from nybble.reporting import model_card, rewrite_report, write_report
from nybble.run.context import OnExisting, RunContext
from nybble.run.progress import ObserverChoice, watching
from nybble.run.record import Observer, RunRecord, Silent
from nybble.run.rendezvous import joined
from nybble.storage.atomic import atomic_folder, write_text
from nybble.storage.cache import Cache, digest
from nybble.training import (
    AnswerScorer,
    HeldOut,
    HeldOutPreferences,
    Judge,
    Kept,
    NextToken,
    Objective,
    PairObjective,
    Probe,
    RatedObjective,
    Reference,
    RunRecorder,
    Start,
    Trackers,
    evaluate,
    generate_answers,
    probe_rates,
    refused_writes,
    sample_answers,
    tracked,
    train_model,
)


def train(
    recipe: RecipeSource = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    on_existing: OnExisting = "refuse",
    force: bool = False,
    observer: ObserverChoice = "auto",
) -> RunRecord:
    """Fine-tune a model and write everything into output_dir.

    Started by a launcher such as torchrun, each process trains on its share of every step; only the first one writes
    and reports to the observer.

    Args:
        recipe: a Recipe, or a YAML file or a mapping of settings with `overrides` on top.
        overrides: settings by name.
        on_existing: what to do if output_dir is not empty. "refuse" raises an InputError. "overwrite" replaces an
            earlier run. "resume" continues from its newest undamaged checkpoint, or starts over if it has none yet.
            "resume_if_any" resumes if output_dir holds a run, and otherwise starts one.
        force: start even if the plan says that the run does not fit, and resume even if what the run learns from has
            changed.
        observer: receives the progress. "auto" shows it: on a terminal, in a notebook, or as INFO records of the
            logger "nybble" if your program has set up `logging` so. None shows nothing.

    Raises:
        InputError, CannotRunError, StoppedError: see `nybble.errors`; nothing is written before model, tokenizer and
            rows are known to be usable.
    """
    if on_existing not in get_args(OnExisting):
        raise RecipeError(f"on_existing: got {on_existing!r}; allowed: {', '.join(get_args(OnExisting))}")
    resolved = _as_recipe(recipe, overrides)
    with (
        joined(resolved.model.device == "cpu") as processes,
        watching(observer if processes.is_main else None) as watch,
    ):
        run = open_run(resolved, on_existing=on_existing, force=force, observer=watch, processes=processes)
        inputs = prepare(resolved, run, force=force)
        if not (inputs.plan.fits or force):
            raise refusal(inputs.plan)
        with written(run, inputs) as recorder:
            model = load(run, inputs, recorder)
            held_out = evaluate_base(run, inputs, model, recorder)
            train_on_rows(run, inputs, model, held_out, recorder)
            evaluate_tuned(run, inputs, model, held_out, recorder)
            save(run, inputs, model, recorder)
    return recorder.record


@contextmanager
def written(run: RunContext, inputs: RunInputs) -> Iterator[RunRecorder]:
    """Create the run's directory and keep its record during the block; then write the report, and upload if asked."""
    directory = run.directory
    starts_over = run.resumes and inputs.checkpointing.resumed is None
    with directory.held(), refused_writes(inputs.checkpointing.parents):
        with run.processes.together():
            directory.create(overwrite=run.on_existing == "overwrite" or starts_over)
        with dispatcher.torch_settings(run.device.torch_device), recorder_of(run, inputs) as recorder:
            check_directory_is_shared(run)
            run.processes.note_begun(str(directory.path))
            if run.processes.is_main:
                write_text(directory.path / "recipe.yaml", save_recipe(inputs.recipe))
                directory.write_mask(learned_tokens_of(inputs))
            with trackers_of(run, inputs) as recorder.trackers:
                yield recorder
        if run.processes.is_main:
            run.observer.stage("report")
            write_report(directory.path)
            directory.write_manifest()
    training = inputs.recipe.training
    if training.push_to_hub and training.hub_model_id and run.processes.is_main:
        base = run.directory.base if run.directory.base.is_dir() else None
        run.observer.note(f"uploaded to {push_folder(weights_folder(run, inputs), training.hub_model_id, base)}")


def recorder_of(run: RunContext, inputs: RunInputs) -> RunRecorder:
    """The recorder that keeps run.json and measures phases."""
    recorder = RunRecorder(run.directory, inputs.recipe, run.device, inputs.rows, inputs.plan, run.processes)
    recorder.record.clock = run.clock.isoformat()
    return recorder


def trackers_of(run: RunContext, inputs: RunInputs) -> AbstractContextManager[Trackers]:
    """The trackers that the recipe asks for; the first process tells them."""
    if not run.processes.is_main:
        return nullcontext(Trackers())
    resumed = inputs.checkpointing.resumed
    return tracked(inputs.recipe.training, run.directory.path, resumed.step if resumed else None)


def learned_tokens_of(inputs: RunInputs) -> list[dict[str, Any]]:
    """Three rows and what is learned in them, for mask.jsonl."""
    nothing = inputs.rows.train[:0]
    learned = replace(inputs.rows, held_out=nothing, dropped=nothing)
    return [asdict(row) for row in show_rows(learned, inputs.tokenizer, 3)]


def evaluate_base(run: RunContext, inputs: RunInputs, model: TrainableModel, recorder: RunRecorder) -> HeldOut:
    """Measure the base on the held-out rows; its answers are kept to be shown with the tuned model's."""
    run.observer.stage("evaluate base")
    section = inputs.evaluation
    prompts = [example.prompt_ids for example in inputs.shown]
    section_of_pairs = inputs.recipe.preferences
    preferences = None if section_of_pairs.objective == "sft" else HeldOutPreferences(section_of_pairs)
    arguments = (section, model.compute_dtype, run.processes)
    with recorder.phase("evaluate_base"):
        measured = evaluate(model.module, inputs.tokenizer, inputs.rows.held_out, *arguments, preferences)
        if measured and not math.isfinite(measured.loss):
            raise ModelError(
                f"{inputs.recipe.model.model_name_or_path}: the base's loss on the held-out rows is not a number; give "
                "an undamaged model, or --bnb_4bit_compute_dtype float32 if its numbers are too large for 16 bits"
            )
        recorder.record.evaluation_base = measured
        if inputs.checkpointing.resumed is None:
            recorder.trackers.log_evaluation(measured, step=0)
        answers = generate_answers(model.module, inputs.tokenizer, prompts, *arguments)
    if preferences and measured and section_of_pairs.needs_reference:
        preferences = replace(preferences, reference=measured.answers)  # the model as training starts
    return HeldOut(inputs.rows.held_out, section, inputs.shown, answers, preferences)


def train_on_rows(
    run: RunContext, inputs: RunInputs, model: TrainableModel, held_out: HeldOut | None, recorder: RunRecorder
) -> None:
    """Train the model in place, as the plan splits the steps; the probe chooses the learning rate first if asked."""
    share = for_one_process(inputs.recipe.training, run.processes.count)
    training = in_micro_batches(share, inputs.plan.micro_batch)
    if training.learning_rate == "probe":
        rate = probe_learning_rate(run, inputs, model, recorder).learning_rate
        training = training.model_copy(update={"learning_rate": rate})
    objective = objective_of(run, inputs, model, recorder)
    run.observer.stage("train")
    seconds_before = sum(phase.seconds for phase in recorder.record.phases.values())
    with recorder.phase("train"):
        result = train_model(
            model.module,
            inputs.tokenizer,
            inputs.groups,
            training,
            run=run.directory,
            device=run.device,
            compute_dtype=model.compute_dtype,
            max_steps=inputs.plan.optimizer_steps,
            observer=run.observer,
            objective=objective,
            held_out=held_out if inputs.rows.held_out else None,
            step_memory=inputs.plan.step_memory,
            checkpointing=inputs.checkpointing,
            deadline=run.deadline,
            trackers=recorder.trackers,
            processes=run.processes,
        )
    recorder.phase_peak("train", result.peak_bytes)
    record = recorder.record
    record.notes += result.notes
    record.train_loss = result.train_loss
    record.skipped_steps = result.skipped_steps
    record.best = result.best
    record.weights_step = result.weights_step
    record.tokens_per_second = result.tokens_per_second
    record.seconds_to_first_step = seconds_before + (result.seconds_to_first_step or 0.0)


def objective_of(run: RunContext, inputs: RunInputs, model: TrainableModel, recorder: RunRecorder) -> Objective:
    """What is minimised; the reference of a preference objective is the model as it is now, before the training."""
    section = inputs.recipe.preferences
    if section.objective == "sft":
        return NextToken()
    if not section.needs_reference:
        return PairObjective(section)
    run.observer.stage("precompute")
    rows = inputs.rows.train
    with recorder.phase("reference"):
        scorer = AnswerScorer(model.module, inputs.tokenizer, model.compute_dtype, section.ld_alpha, run.processes)
        is_asked_later = section.objective == "kto" or not section.precompute_ref_log_probs
        start = Start(model.module) if is_asked_later else None
        reference = Reference(rows, 2 if section.compares else 1, scorer, start)
        if section.precompute_ref_log_probs:
            kept = kept_reference(inputs, model)
            n_cached = reference.compute(model.module, kept, partial(run.observer.progress, "reference"))
            run.observer.note(f"the reference's log-probabilities of {len(rows):,} rows, {n_cached:,} from the cache")
    if section.compares:
        return PairObjective(section, reference)
    return RatedObjective(section, reference, torch.from_numpy(rows.column("is_desirable").astype(bool)))


def kept_reference(inputs: RunInputs, model: TrainableModel) -> Kept | None:
    """Where the reference's log-probabilities are cached, under all that decides them; None if caching is off."""
    recipe, identity = inputs.recipe, inputs.checkpointing.identity()
    if not recipe.quantization.cache:
        return None
    start = "the base" if recipe.method == "full" else Start(model.module).sha256
    sections = ("data.", "model.", "quantization.", "lora.", "method", "preferences.objective", "preferences.ld_alpha")
    settings = {name: value for name, value in identity.settings.items() if name.startswith(sections)}
    device = str(next(model.module.parameters()).device.type)
    parts = (identity.base, identity.tokenizer, identity.rows, settings, start, str(model.compute_dtype), device)
    return Kept(Cache("reference", recipe.quantization.cache_limit), digest(*parts))


def probe_learning_rate(run: RunContext, inputs: RunInputs, model: TrainableModel, recorder: RunRecorder) -> Probe:
    """Try learning rates on a small part of the run; model and random numbers are then as before."""
    run.observer.stage("probe")
    section = inputs.evaluation
    judge = Judge(
        method=inputs.recipe.method,
        held_out=inputs.rows.held_out,
        evaluate=lambda rows: evaluate(model.module, inputs.tokenizer, rows, section, model.compute_dtype),
    )
    with recorder.phase("probe"):
        probed = probe_rates(
            model.module,
            inputs.tokenizer,
            inputs.groups,
            for_one_process(inputs.recipe.training, run.processes.count),
            judge,
            run=run.directory,
            device=run.device,
            compute_dtype=model.compute_dtype,
            max_steps=inputs.plan.optimizer_steps,
            is_resumed=inputs.checkpointing.resumed is not None,
            observer=run.observer,
            step_memory=inputs.plan.step_memory,
            deadline=run.deadline,
        )
    run.observer.note(probed.in_words)
    recorder.record.notes.append(probed.in_words)
    recorder.record.probe = asdict(probed)
    return probed


def evaluate_tuned(
    run: RunContext, inputs: RunInputs, model: TrainableModel, held_out: HeldOut, recorder: RunRecorder
) -> None:
    """Measure the tuned model as the base was measured, and write its answers with the base's."""
    run.observer.stage("evaluate")
    if inputs.recipe.method == "full":
        model.module.to(model.compute_dtype)  # what is saved is what is measured
    arguments = (held_out.section, model.compute_dtype, run.processes)
    with recorder.phase("evaluate"):
        measured = evaluate(model.module, inputs.tokenizer, held_out.rows, *arguments, held_out.preferences)
        # Nothing else looks at what the last update did: without held-out rows, a row of the training is tried.
        tried = measured or evaluate(model.module, inputs.tokenizer, _first_row(inputs), *arguments)
        if tried and not math.isfinite(tried.loss):
            raise _diverged(inputs, "the tuned model's loss is not a number")
        for sample in sample_answers(model.module, inputs.tokenizer, held_out, model.compute_dtype, run.processes):
            run.directory.append_sample(sample)
    record = recorder.record
    if measured and record.evaluation_base:
        run.directory.write_held_out(record.evaluation_base, measured)
    record.evaluation_tuned = measured
    recorder.trackers.log_evaluation(measured)
    record.eval_loss = measured.loss if measured else None


def _first_row(inputs: RunInputs) -> list[Example]:
    return [replace(example, answer=None) for example in inputs.rows.train[:1]]


def _diverged(inputs: RunInputs, what: str) -> InputError:
    training = inputs.recipe.training
    return InputError(
        f"{what} after the last step: the training diverged, and no weights are written; lower --learning_rate "
        f"({training.learning_rate}) or --weight_decay ({training.weight_decay:g}), and train again with --overwrite"
    )


def save(run: RunContext, inputs: RunInputs, model: TrainableModel, recorder: RunRecorder) -> None:
    """Write what was trained: the adapter, or the whole model if every parameter was trained."""
    run.observer.stage("save")
    with recorder.phase("save"):
        trained = trained_parameters(model.module)  # every process takes part
        with run.processes.together():
            if not all(bool(tensor.isfinite().all()) for tensor in trained.values()):
                raise _diverged(inputs, "a trained weight is not finite")
        if not run.processes.is_main:
            return
        recorder.record.model["weights_hash"] = inputs.checkpointing.identity().base
        with atomic_folder(weights_folder(run, inputs)) as folder:
            if inputs.recipe.method == "full":
                write_whole(folder, model.module, inputs.tokenizer, inputs.source)
            else:
                save_adapter(model.module, folder, trained)
                inputs.tokenizer.save_pretrained(folder)
            write_note(folder, inputs.recipe, recorder.record.rows["ledger"], recorder.record.model, run.clock)
            write_text(folder / "README.md", model_card(recorder.record.to_json()))  # PEFT's own is a form to fill in


def weights_folder(run: RunContext, inputs: RunInputs) -> Path:
    """Where the trained weights of a run are written."""
    return run.directory.full_model if inputs.recipe.method == "full" else run.directory.adapter


@dataclass(frozen=True)
class Inspection:
    """What `inspect_rows` found."""

    source: str
    ledger: Ledger
    rows: list[ShownRow]
    fault: str | None  # why `train` would refuse the rows


def inspect_rows(
    recipe: RecipeSource,
    overrides: Mapping[str, Any] | None = None,
    *,
    show: int = 5,
    find: str = "",
    observer: ObserverChoice = "auto",
) -> Inspection:
    """The ledger of a recipe's rows, and `show` of them (that contain `find`) with what is learned in them.

    Nothing is trained and no weights are read: a folder that holds only a tokenizer will do.

    Raises:
        InputError: tokenizer or rows cannot be used.
    """
    resolved = take_over_adapter(_as_recipe(recipe, overrides))
    with watching(observer) as watch:
        tokenizer, context = find_tokenizer(resolved.model)
        add_new_tokens(tokenizer, resolved.lora.new_tokens)
        resolved = within_context(resolved, context, watch.note)
        cache = rows_cache(resolved.quantization)
        seed = resolved.training.seed
        objective = resolved.preferences.objective
        prepared = examine_rows(resolved.data, resolved.evaluation, tokenizer, seed, cache, watch, objective)
    shown = show_rows(prepared, tokenizer, show, find)
    return Inspection(resolved.data.source, replace(prepared.ledger, context=context), shown, prepared.fault)


def probe(
    recipe: RecipeSource, overrides: Mapping[str, Any] | None = None, *, observer: ObserverChoice = "auto"
) -> Probe:
    """The learning rate that `training.learning_rate: probe` would choose, with its curve; nothing is kept.

    Raises:
        InputError, CannotRunError, StoppedError: as `train`; RecipeError where the run is too short to probe.
    """
    resolved = _as_recipe(recipe, overrides)
    if resolved.preferences.objective != "sft":
        raise RecipeError(f"a probe compares supervised losses; objective {resolved.preferences.objective} has none")
    with watching(observer) as watch, TemporaryDirectory() as folder:
        training = resolved.training.model_copy(update={"output_dir": folder})
        resolved = resolved.model_copy(update={"training": training})
        run = open_run(resolved, observer=watch)
        inputs = prepare(resolved, run)
        with dispatcher.torch_settings(run.device.torch_device), recorder_of(run, inputs) as recorder:
            model = load(run, inputs, recorder)
            return probe_learning_rate(run, inputs, model, recorder)


def train_without_evaluation(recipe: Recipe, *, resume: bool = False, observer: Observer | None = None) -> RunRecord:
    """Only the training of a run: nothing is measured on held-out rows, and only checkpoints are written.

    Raises:
        InputError, CannotRunError, StoppedError: as `train`.
    """
    run = open_run(recipe, on_existing="resume" if resume else "refuse", observer=observer or Silent())
    inputs = prepare(recipe, run)
    settings = dispatcher.torch_settings(run.device.torch_device)
    with settings, run.directory.held(), recorder_of(run, inputs) as recorder:
        model = load(run, inputs, recorder)
        train_on_rows(run, inputs, model, None, recorder)
    return recorder.record


def demo(
    output_dir: Path | str = "runs/demo",
    overrides: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
    observer: ObserverChoice = "auto",
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
    """Write report.html, report.md and report.json of a run or comparison again from its files."""
    return rewrite_report(Path(run_dir))


def _as_recipe(recipe: RecipeSource, overrides: Mapping[str, Any] | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError("overrides go with a recipe file or a mapping; a Recipe is already resolved")
    return recipe
