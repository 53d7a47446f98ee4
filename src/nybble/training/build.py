"""A training from its parts: `build` puts them together, `train_model` also runs it and says why it ended early."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nybble.data import Groups
from nybble.errors import CannotRunError, StoppedError
from nybble.hardware import Device, PeakMemory, is_out_of_memory
from nybble.models import is_sharded
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.recipe import EvaluationSection, StepMemory, TrainingSection, evaluation_pace, saving_pace
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer, Silent
from nybble.storage.checkpoints import Place
from nybble.training.activation_checkpointing import recomputation_for
from nybble.training.best import BestStep
from nybble.training.checkpoint import Checkpointing, CheckpointWriter, load_checkpoint, load_weights
from nybble.training.dataloader import StepLoader
from nybble.training.evaluate import HeldOut, batches_for
from nybble.training.guards import NonFiniteGuard
from nybble.training.loop import Training, refuse_bad_step, train
from nybble.training.metrics import Metrics
from nybble.training.neftune import EmbeddingNoise
from nybble.training.objective import NextToken, Objective
from nybble.training.optim import create_optimizer, create_schedule
from nybble.training.run_recorder import software_versions
from nybble.training.state import TrainState
from nybble.training.stopping import Stops
from nybble.training.trackers import Trackers


@dataclass(frozen=True)
class TrainResult:
    """What training measured."""

    train_loss: float  # mean over all steps that were not skipped
    steps: int
    tokens: int  # tokens trained on since this start
    seconds: float  # seconds since this start
    seconds_to_first_step: float | None  # from the start of training, loading not counted
    peak_bytes: int
    skipped_steps: int = 0  # steps whose loss or gradient was not finite or spiked
    notes: tuple[str, ...] = ()  # remarks for people
    best: dict[str, Any] | None = None  # step, metric and value of the best evaluation on the way
    weights_step: int = 0  # the step that the final weights come from

    @property
    def tokens_per_second(self) -> float:
        """Tokens without padding, over the whole of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


def build(
    model: Any,
    tokenizer: Any,
    groups: Groups,
    section: TrainingSection,
    *,
    run: RunDirectory,
    device: Device,
    compute_dtype: torch.dtype,
    max_steps: int,
    observer: Observer | None = None,
    objective: Objective | None = None,
    held_out: HeldOut | None = None,
    step_memory: StepMemory | None = None,
    checkpointing: Checkpointing | None = None,
    deadline: float | None = None,
    trackers: Trackers | None = None,
    processes: Processes = Processes(),  # noqa: B008 - a value
) -> Training:
    """Put the parts of a training together, at its start or at the checkpoint that it continues from.

    Args:
        model: is trained in place.
        tokenizer: for batches that need padding, and for answers.
        groups: rows, which are drawn group by group.
        section: the recipe's; rows and micro-batches are those of one process.
        run: takes the logged steps.
        device: where `model` computes.
        compute_dtype: of the arithmetic.
        max_steps: optimizer steps in all.
        observer: receives steps and notes.
        objective: what is minimised; None: the loss of the next token.
        held_out: rows that are evaluated on the way, as often as their section says.
        step_memory: what a step takes at each depth of recomputation; None: every layer is recomputed.
        checkpointing: None: no checkpoints are written.
        deadline: by the monotonic clock; the training saves and stops before.
        trackers: receive the logged figures.
        processes: that share each step.
    """
    from transformers import set_seed

    from nybble.models.lora_linear import share_seeds  # this imports PEFT

    observer = observer or Silent()
    resumed = checkpointing.resumed if checkpointing else None
    run.warn = observer.note
    set_seed(section.seed)
    share_seeds(model, seeds := DropoutSeeds(section.seed))
    objective = objective or NextToken()
    collate = batches_for(model, tokenizer)
    loader = StepLoader(groups, lambda drawn: objective.collate(collate(drawn)), section, processes)
    n_beside = processes.beside_on(device.type)
    recomputation = recomputation_for(model, section, device, step_memory, n_beside)
    optimizer = create_optimizer(model, section, device)
    schedule = create_schedule(optimizer, section, max_steps)
    scaler = torch.amp.GradScaler(device.type) if compute_dtype == torch.float16 else None
    evaluation = held_out.section if held_out else EvaluationSection()
    best = BestStep(evaluation)
    state = TrainState(
        model,
        optimizer,
        schedule,
        scaler,
        loader,
        device.torch_device,
        processes,
        best,
        n_figures=len(objective.figures),
    )
    writer = _writer(section, checkpointing, observer, processes)
    model.zero_grad(set_to_none=True)
    if resumed is not None:
        run.drop_lines_after(resumed.step)
        load_checkpoint(model, state, resumed)
    return Training(
        model=model,
        parallel_model=_in_parallel(model, device, processes),
        tokenizer=tokenizer,
        section=section,
        max_steps=max_steps,
        device=device,
        compute_dtype=compute_dtype,
        objective=objective,
        loader=loader,
        state=state,
        seeds=seeds,
        noise=EmbeddingNoise(model, section.neftune_noise_alpha, section.seed),
        guard=NonFiniteGuard(section, state.gradient_norms, processes),
        recomputation=recomputation,
        writer=writer,
        stops=Stops(deadline, lambda: writer.seconds, processes),
        metrics=Metrics(run, observer, PeakMemory(device), max_steps, trackers or Trackers(), processes),
        run=run,
        observer=observer,
        held_out=held_out,
        evaluations=evaluation_pace(evaluation, section.logging_steps, max_steps, loader.steps_an_epoch),
        saves=saving_pace(section, max_steps, loader.steps_an_epoch),
        processes=processes,
    )


def train_model(model: Any, tokenizer: Any, groups: Groups, section: TrainingSection, **parts: Any) -> TrainResult:
    """Train `model` in place; the arguments are those of `build`.

    Raises:
        InputError: loss or gradient are not finite, or the gradient spikes.
        StoppedError: a signal came, or the time is up; the state is saved.
        CannotRunError: out of memory, the device is lost, or a stopped state cannot be saved.
    """
    t = build(model, tokenizer, groups, section, **parts)
    started, tokens_before = time.monotonic(), t.state.tokens
    with t.stops, t.noise, _device_errors_in_words(t.device, t.writer), _deterministic(section.deterministic):
        train(t)
        bad = t.guard.read()
        if bad is not None:
            refuse_bad_step(t, bad)
        t.writer.close()
    _check_for_early_stop(t)
    best_notes, weights_step = _end_with_best(t) if t.state.best.counts else ([], t.state.step)
    return TrainResult(
        train_loss=t.state.mean_loss,
        steps=t.state.step,
        tokens=t.state.tokens - tokens_before,
        seconds=time.monotonic() - started,
        seconds_to_first_step=t.metrics.seconds_to_first_step,
        peak_bytes=t.metrics.peak_bytes,
        skipped_steps=t.state.skipped_steps,
        notes=(*_notes(t), *best_notes),
        best=t.state.best.to_json(),
        weights_step=weights_step,
    )


def _in_parallel(model: Any, device: Device, processes: Processes) -> Any:
    """The model as several processes train it; in shards it reduces its gradients itself."""
    if not processes.are_many or is_sharded(model):
        return model
    # Scales of packed weights are buffers; nothing that is frozen changes, and all that is trained has a gradient.
    return torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.torch_device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        find_unused_parameters=False,
    )


def _writer(
    section: TrainingSection, checkpointing: Checkpointing | None, observer: Observer, processes: Processes
) -> CheckpointWriter:
    if checkpointing is None or not processes.is_main:
        return CheckpointWriter((), section.save_total_limit, observer.note)
    return CheckpointWriter(
        checkpointing.parents,
        section.save_total_limit,
        observer.note,
        identity=lambda: checkpointing.identity().to_json(),
        about={"recipe": checkpointing.recipe, "versions": software_versions()},
        resumed=checkpointing.resumed.path if checkpointing.resumed else None,
        damaged=checkpointing.damaged,
    )


@contextmanager
def _deterministic(is_wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms where it has them, while training; cuBLAS needs a variable, too (docs)."""
    deterministic: Any = torch.utils.deterministic
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    if is_wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # No result depends on memory as it was allocated, and filling all of it takes as long as writing it.
        deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        deterministic.fill_uninitialized_memory = fills


@contextmanager
def _device_errors_in_words(device: Device, writer: CheckpointWriter) -> Iterator[None]:
    """What a device does to a training, as an error that says how to continue."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        writer.finish()
        # First, since libraries that find no memory for themselves call it an error of the device.
        if is_out_of_memory(error):
            raise _out_of_memory(device, writer) from error
        if not is_device_loss(error):
            raise
        line = str(error).strip().partition("\n")[0].rstrip(".")
        raise CannotRunError(f"{device.name} is lost ({line}); see `nybble doctor`; {writer.way_on}") from error


def _out_of_memory(device: Device, writer: CheckpointWriter) -> CannotRunError:
    return CannotRunError(
        f"out of memory on {device.name}; use --memory_budget, a smaller --per_device_train_batch_size (with more "
        f"--gradient_accumulation_steps), or a shorter --max_length; {writer.way_on}"
    )


def is_device_loss(error: Exception) -> bool:
    """Whether torch says that the device, not the program, failed."""
    return isinstance(error, torch.AcceleratorError) or any(
        word in str(error) for word in ("CUDA error", "HIP error", "hipError", "device lost", "device-side")
    )


def _check_for_early_stop(t: Training) -> None:
    if t.stops.reason is None or t.state.step >= t.max_steps or t.state.best.is_over:
        return
    at = f"{t.stops.reason} at step {t.state.step} of {t.max_steps}"
    if t.writer.refusal is not None:
        raise CannotRunError(f"{at}, and its state could not be saved ({t.writer.refusal}); {t.writer.way_on}")
    raise StoppedError(f"{at}: saved; continue with --resume")


def _end_with_best(t: Training) -> tuple[list[str], int]:
    """Load the best weights if they are asked for; what became of the evaluations, in words, and the weights' step."""
    best = t.state.best
    step = t.state.step
    words = [best.in_words]
    if best.is_over and t.state.step < t.max_steps:
        words.insert(0, f"stopped early at step {t.state.step} of {t.max_steps}")
    if best.is_loaded_at_end and best.step not in (None, t.state.step):
        found = t.processes.gather(t.writer.checkpoint_of(Place(best.step)))[0]
        if found is None:
            words.append("its checkpoint could not be written or is damaged: the last weights are kept")
        else:
            load_weights(t.model, found)
            words.append("its weights are taken")
            step = best.step
    note = ", ".join(words)
    t.observer.note(note)
    return [note], step


def _notes(t: Training) -> Iterator[str]:
    """The notes on the steps, for people."""
    if t.parities:
        loss = max(parity.loss_difference for parity in t.parities)
        gradient = max(parity.gradient_difference for parity in t.parities)
        yield (
            f"{len(t.parities)} micro-steps beside the plain path: loss within {loss:.1e}, gradients within "
            f"{gradient:.1e}"
        )
    if t.recomputation is not None and t.recomputation.in_words:
        yield t.recomputation.in_words
