"""The training itself: transformers' Trainer with our batches, our logbook and our stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble.data import Example, FlatBatch, PadBatch, as_features
from nybble.errors import CannotRunError, InputError, StoppedError
from nybble.hardware import Device, PeakMemory
from nybble.models import blocks_of
from nybble.nn.seeds import Seeds
from nybble.recipe import TrainingSection
from nybble.runs import Observer, RunDirectory
from nybble.training.arguments import trackers, training_arguments
from nybble.training.callbacks import Checks, CountingBatch, Logbook, StopOnSignal
from nybble.training.depth import Recomputation, count_activations, decoder_layers, free_bytes, used_bytes
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


def train_model(
    model: Any, tokenizer: Any, examples: Sequence[Example], section: TrainingSection, setup: Setup
) -> TrainResult:
    """Train `model` in place on `examples`.

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
        _recomputation(model, section, setup),
        model=model,
        args=training_arguments(section, run.checkpoints, setup.device, setup.compute_dtype, setup.max_steps),
        train_dataset=as_features(examples),
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
    if logbook.diverged_at is not None:
        last = run.last_checkpoint()
        raise InputError(
            f"the loss is not a number at step {logbook.diverged_at}; lower --learning_rate ({section.learning_rate:g})"
            f" or --max_grad_norm; kept: events.jsonl and {last.name if last else 'no checkpoint (none was due)'}"
        )
    if stop.received is not None:
        raise StoppedError(
            f"{stop.received.name} at step {trainer.state.global_step} of {trainer.state.max_steps}: saved; "
            "go on with --resume"
        )
    return TrainResult(
        train_loss=float(outcome.training_loss),
        steps=trainer.state.global_step,
        tokens=logbook.tokens,
        seconds=logbook.seconds,
        seconds_to_first_step=logbook.seconds_to_first_step,
        peak_bytes=logbook.peak_bytes,
    )


def _recomputation(model: Any, section: TrainingSection, setup: Setup) -> Recomputation | None:
    """What decides how many layers are recomputed; None where none ever is."""
    if section.gradient_checkpointing == "never" or not decoder_layers(model):
        return None
    if section.gradient_checkpointing == "always":
        return Recomputation(model, lambda: 0.0, None)
    collate = FlatBatch() if blocks_of(model).flattened else PadBatch(0)

    def sample(n_tokens: int) -> dict[str, Any]:
        batch = collate([{"input_ids": [0] * n_tokens, "labels": [0] * n_tokens}])
        return {k: v.to(setup.device.torch_device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    with torch.autocast(setup.device.type, setup.compute_dtype, enabled=setup.compute_dtype != torch.float32):
        activations = count_activations(model, sample)
    return Recomputation(model, partial(_activation_budget, model, section, setup.device), activations)


def _activation_budget(model: Any, section: TrainingSection, device: Device) -> float:
    """Bytes that activations may take now: of the budget what weights, gradients and optimizer leave."""
    free = free_bytes(device.torch_device)
    if section.memory_budget is not None:
        free = min(free, section.memory_budget_bytes - used_bytes(device.torch_device))
    trained = [p for p in model.parameters() if p.requires_grad]
    to_come = sum(p.numel() * 4 * ((p.grad is None) * 3) for p in trained)  # gradient and two moments, before step 1
    return 0.95 * (free - to_come)


def _tensorboard(section: TrainingSection, run: RunDirectory) -> list[Any]:
    if "tensorboard" not in trackers(section):
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(run.path / "tensorboard")))]
