"""The training loop.

    for each optimizer step
        for each micro-batch: forward, backward
        clip, judge, update, schedule
        log, evaluate, save

`train` is the loop, and what it calls stands below it in the order of the calls. `nybble.training.build` puts the parts
of a training together.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from nybble.errors import InputError
from nybble.hardware import Device, is_out_of_memory
from nybble.kernels import send
from nybble.models import full_tensors
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.nn.workspace import workspace
from nybble.recipe import Pace, TrainingSection, saves_by_time
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer
from nybble.training.activation_checkpointing import Recomputation, SavedGradients
from nybble.training.checkpoint import CheckpointWriter, check_optimizer_can_be_saved
from nybble.training.dataloader import MicroBatch, StepLoader
from nybble.training.evaluate import HeldOut, evaluate_quickly, sample_answers
from nybble.training.guards import BadStep, NonFiniteGuard
from nybble.training.metrics import Metrics
from nybble.training.neftune import EmbeddingNoise
from nybble.training.objective import Objective
from nybble.training.optim import learning_rate_of
from nybble.training.parity import Parity, check, compare
from nybble.training.state import TrainState
from nybble.training.stopping import Stops

_MICRO_STEPS = 1 << 20  # one optimizer step has fewer micro-batches than this


@dataclass
class Training:
    """The parts of a training, put together by `nybble.training.build`."""

    model: Any
    parallel_model: Any  # the model itself, or DistributedDataParallel around it
    tokenizer: Any
    section: TrainingSection
    max_steps: int
    device: Device
    compute_dtype: torch.dtype
    objective: Objective
    loader: StepLoader
    state: TrainState
    seeds: DropoutSeeds
    noise: EmbeddingNoise
    guard: NonFiniteGuard
    recomputation: Recomputation | None
    writer: CheckpointWriter
    stops: Stops
    metrics: Metrics
    run: RunDirectory
    observer: Observer
    held_out: HeldOut | None
    evaluations: Pace
    saves: Pace
    processes: Processes
    parities: list[Parity] = field(default_factory=list)
    has_run_out_of_memory: bool = False


def train(t: Training) -> None:
    """Run the steps that are left; returns after the last one, or where the patience with evaluations is at its end, or
    with the state saved where a stop was asked for.

    Raises:
        InputError: loss or gradient are not finite, or the gradient spikes.
    """
    state, section = t.state, t.section
    t.model.train()
    for step in range(state.step, t.max_steps):
        if state.best.is_over:
            return
        micro_batches = t.loader.micro_batches_of(step)
        counts = [t.objective.counts(batch) for batch in micro_batches]
        n_items = tuple(t.processes.sum(sum(parts)) for parts in zip(*counts, strict=True))
        n_tokens = t.processes.sum(sum(batch.n_tokens for batch in micro_batches))
        rows = [row for batch in micro_batches for row in batch.rows]
        if state.micro_batches == 0:
            state.begin_step()
        t.objective.begin_step(t.model, t.loader, step)

        for number in range(state.micro_batches, len(micro_batches)):
            is_last = number == len(micro_batches) - 1
            # Numbered as by one process, so that the same micro-batches draw the same dropout.
            t.seeds.micro_step = step * _MICRO_STEPS + number * t.processes.count + t.processes.rank
            with gradient_sync(t, wanted=is_last):
                loss, figures = forward_backward(t, micro_batches[number], n_items)
            state.finish_micro_batch(loss, figures)
            if not is_last and t.stops.within_step():
                save(t)
                return

        norm = clip_gradients(t)
        state.share_step_loss()
        is_skipped = not is_good(t, rows, norm)
        if is_skipped:
            t.model.zero_grad(set_to_none=True)  # the update then changes no weight and no moment
        learning_rate = learning_rate_of(state.optimizer)
        if update(t):
            state.schedule.step()
        t.model.zero_grad(set_to_none=True)
        state.finish_step(n_tokens, is_skipped=is_skipped)
        t.metrics.first_step_is_done()

        is_last = state.step == t.max_steps
        is_wanted = step == 0 or state.step % section.logging_steps == 0 or is_last
        log_step(t, learning_rate, norm, is_wanted=is_wanted)
        is_best = False
        if state.best.counts if is_last else t.evaluations.is_due(state.step):
            is_best = evaluate_on_the_way(t)
        is_stopped = t.stops.after_step()
        log_step(t, learning_rate, norm, is_wanted=state.best.is_over)
        is_last = is_last or state.best.is_over
        is_wanted = is_best and (state.best.is_loaded_at_end or section.save_strategy == "best")
        if is_stopped or is_wanted or t.saves.is_due(state.step) or (is_last and section.save_strategy != "no"):
            save(t)
        else:
            save_if_overdue(t)
        if is_stopped:
            return


def gradient_sync(t: Training, *, wanted: bool) -> AbstractContextManager[Any]:
    """Within: whether a backward pass sums the gradients of all processes. Weights in shards always do."""
    return nullcontext() if wanted or t.parallel_model is t.model else t.parallel_model.no_sync()


def forward_backward(t: Training, batch: MicroBatch, n_items: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The loss and the figures of a micro-batch, with its gradients added to those that are there.

    A batch that runs out of memory is repeated with more layers recomputed, from the same gradients and dropout seeds:
    what is learned is the same.
    """
    step = t.state.step
    device = t.device.torch_device
    inputs = to_device({**batch.inputs, **t.objective.beside(batch.places)}, device)
    counts = tuple(torch.full((), float(n), device=device) for n in n_items)  # `torch.tensor` waits for a GPU
    t.noise.begin(step, batch.rows, batch.lengths)
    if step < t.section.parity_steps and "lengths" in inputs:
        t.parities.append(compare(t.model, inputs, counts[0], t.compute_dtype))
        check(t.parities[-1], step + 1, t.compute_dtype)
    if t.recomputation is None:
        return _forward_backward(t, inputs, counts)
    n_tokens = inputs["input_ids"].numel()
    t.recomputation.prepare(n_tokens)
    before = SavedGradients(t.state.trained.values(), may_copy=t.recomputation.may_copy_gradients)
    while True:
        try:
            return _forward_backward(t, inputs, counts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Several processes cannot repeat it, because the others are in the middle of the pass.
            if t.processes.are_many or not before.can_restore or not t.recomputation.deepen(n_tokens):
                raise
        # Only here, outside the handler, are the failed pass's tensors gone.
        before.restore()
        workspace.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not t.has_run_out_of_memory:
            t.has_run_out_of_memory = True
            t.observer.note(
                f"memory ran out at step {step + 1}: the batch is repeated with {t.recomputation.depth} layers "
                "recomputed, and later ones get less room; the result is the same"
            )


def _forward_backward(t: Training, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    # The backward pass on a GPU would run in a thread of its own, with reused memory of its own.
    with torch.autograd.set_multithreading_enabled(False):
        loss, figures = loss_of(t, inputs, counts)
        (loss if t.state.scaler is None else t.state.scaler.scale(loss)).backward()
        return loss.detach(), figures


def loss_of(t: Training, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The forward pass; DistributedDataParallel takes the mean of the gradients, where the sum is wanted."""
    with torch.autocast(t.device.type, t.compute_dtype, enabled=t.compute_dtype != torch.float32):
        loss, figures = t.objective(t.parallel_model, inputs, counts)
    return loss.float() * t.processes.count, figures * t.processes.count


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a batch on `device`; the host does not wait for the copy."""
    return {name: send(value, device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def clip_gradients(t: Training) -> Tensor:
    """Clip them all together to the recipe's norm; the norm that they had."""
    if t.state.scaler is not None:
        t.state.scaler.unscale_(t.state.optimizer)
    limit = t.section.max_grad_norm or float("inf")
    norm: Tensor = full_tensors(torch.nn.utils.clip_grad_norm_(t.model.parameters(), limit))
    return norm


def is_good(t: Training, rows: list[int], norm: Tensor) -> bool:
    """Whether the update shall happen: a bad step is skipped, or stops the training."""
    bad = t.guard.judge(t.state.step + 1, rows, t.state.step_loss, norm, is_scaled=t.state.scaler is not None)
    if bad is None:
        return True
    if t.section.bad_batch == "stop":
        refuse_bad_step(t, bad)
    t.observer.note(f"{bad.in_words}: the batch is skipped")
    return False


def update(t: Training) -> bool:
    """The optimizer's step; False where the scaler left it out, since float16 gradients overflowed."""
    optimizer, scaler = t.state.optimizer, t.state.scaler
    if scaler is None:
        optimizer.step()
        is_done = True
    else:
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        is_done = scaler.get_scale() >= scale
    if t.state.step == 0:
        check_optimizer_can_be_saved(optimizer, t.model, t.section.optim)
    return is_done


def log_step(t: Training, learning_rate: float, norm: Tensor, *, is_wanted: bool) -> None:
    """Log the mean loss of the steps that were not logged yet, if there are any."""
    if is_wanted and t.state.unlogged_steps:
        figures = t.state.take_unlogged_figures(t.objective.figures)
        t.metrics.log_step(t.state, t.state.take_unlogged_loss(), learning_rate, norm, figures)


def evaluate_on_the_way(t: Training) -> bool:
    """Answers to the rows that are shown, and figures of all that are held out; whether those are the best so far."""
    if t.held_out is None:
        return False
    for sample in sample_answers(t.model, t.tokenizer, t.held_out, t.compute_dtype, t.processes, step=t.state.step):
        t.run.append_sample(sample)
    measured = evaluate_quickly(t.model, t.tokenizer, t.held_out, t.compute_dtype, t.processes)
    if measured is None:
        return False
    t.metrics.log_evaluation(t.state, measured)
    return t.state.best.judge(t.state.step, measured)


def save(t: Training) -> None:
    """Write a checkpoint, unless a step turns out to be bad that the guard has not read yet."""
    bad = t.guard.read()
    if bad is not None:
        refuse_bad_step(t, bad)
    t.writer.save(t.model, t.state, t.section.optim)


def save_if_overdue(t: Training) -> None:
    """Write a checkpoint if the latest is `save_minutes` old, by the clock of any process."""
    if not saves_by_time(t.section):
        return
    if t.processes.any(time.monotonic() - t.writer.saved >= 60 * t.section.save_minutes):
        save(t)
        t.writer.finish()  # the plan has no room for this copy beside a step


def refuse_bad_step(t: Training, bad: BadStep) -> NoReturn:
    """End a training whose numbers are not finite.

    Raises:
        InputError: always.
    """
    t.writer.finish()
    raise InputError(
        f"{bad.in_words}; look at those rows, lower --learning_rate ({t.section.learning_rate}) or --max_grad_norm, or "
        f"skip such batches with --bad_batch skip; {t.writer.way_on}"
    )
