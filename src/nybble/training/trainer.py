"""The training itself: transformers' Trainer with our batches, our logbook and our stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nybble.data import Groups
from nybble.errors import CannotRunError, InputError, StoppedError
from nybble.hardware import Device, PeakMemory
from nybble.nn.seeds import Seeds
from nybble.recipe import StepMemory, TrainingSection
from nybble.runs import Observer, RunDirectory
from nybble.training.arguments import trackers, training_arguments
from nybble.training.callbacks import Checks, CountingBatch, Logbook, StopOnSignal
from nybble.training.depth import recomputation_for
from nybble.training.evaluate import batches_for


@dataclass(frozen=True)
class TrainResult:
    """What training measured."""

    train_loss: float  # mean over all steps
    steps: int
    tokens: int
    seconds: float
    seconds_to_first_step: float | None  # from the start of training, loading not counted
    peak_bytes: int
    notes: tuple[str, ...] = ()  # for people

    @property
    def tokens_per_second(self) -> float:
        """Tokens without padding, over the whole of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Setup:
    """Where a training happens."""

    run: RunDirectory
    device: Device
    compute_dtype: torch.dtype
    observer: Observer
    check: Callable[[int], float]  # step -> held-out loss
    check_every: int  # steps; 0: never
    max_steps: int
    resume: bool
    memory: StepMemory | None = None  # what a step takes at each depth of recomputation; None: all is recomputed
    saves: bool = True  # whether checkpoints are written


def train_model(model: Any, tokenizer: Any, groups: Groups, section: TrainingSection, setup: Setup) -> TrainResult:
    """Train `model` in place on rows, which are drawn group by group.

    Raises:
        InputError: the loss is no longer a number.
        StoppedError: a signal came; the state is saved.
        CannotRunError: out of memory.
    """
    from transformers.trainer_callback import PrinterCallback

    from nybble.models.lora import share_seeds  # brings PEFT
    from nybble.training.steps import StepTrainer

    run = setup.run
    batches = CountingBatch(batches_for(model, tokenizer))
    logbook = Logbook(run, setup.observer, PeakMemory(setup.device), batches)
    checks = Checks(setup.check_every, setup.check)
    stop = StopOnSignal()
    seeds = Seeds(section.seed)
    share_seeds(model, seeds)
    trainer = StepTrainer(
        seeds,
        recomputation_for(model, section, setup.device, setup.memory),
        setup.observer.note,
        section.parity_steps,
        model=model,
        args=training_arguments(
            section, run.checkpoints if setup.saves else None, setup.device, setup.compute_dtype, setup.max_steps
        ),
        train_dataset=groups,
        data_collator=batches,
        callbacks=[logbook, checks, stop, *_tensorboard(section, run)],
    )
    trainer.remove_callback(PrinterCallback)
    logbook.accumulation = lambda: trainer.current_gradient_accumulation_steps
    checks.log = trainer.log
    checkpoint = run.last_checkpoint() if setup.resume else None
    if checkpoint is not None:
        logbook.before = run.drop_events_after(int(checkpoint.name.partition("-")[2]))
    try:
        with stop:
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise CannotRunError(
            f"out of memory on {setup.device.name}; use --memory_budget, a smaller "
            "--per_device_train_batch_size (with more --gradient_accumulation_steps), or a shorter --max_length"
        ) from error
    _check_ending(trainer, logbook, stop, run, section)
    return TrainResult(
        train_loss=float(outcome.training_loss),
        steps=trainer.state.global_step,
        tokens=logbook.tokens,
        seconds=logbook.seconds,
        seconds_to_first_step=logbook.seconds_to_first_step,
        peak_bytes=logbook.peak_bytes,
        notes=trainer.notes(),
    )


def _check_ending(
    trainer: Any, logbook: Logbook, stop: StopOnSignal, run: RunDirectory, section: TrainingSection
) -> None:
    """Raise what made training end early."""
    if logbook.diverged_at is not None:
        last = run.last_checkpoint()
        raise InputError(
            f"the loss is not a number at step {logbook.diverged_at}; lower --learning_rate ({section.learning_rate})"
            f" or --max_grad_norm; kept: events.jsonl and {last.name if last else 'no checkpoint (none was due)'}"
        )
    if stop.received is not None:
        raise StoppedError(
            f"{stop.received.name} at step {trainer.state.global_step} of {trainer.state.max_steps}: saved; "
            "go on with --resume"
        )


def _tensorboard(section: TrainingSection, run: RunDirectory) -> list[Any]:
    if "tensorboard" not in trackers(section):
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(run.path / "tensorboard")))]
