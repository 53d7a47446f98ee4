"""The training itself: transformers' Trainer with our batches, our logbook and our stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nybble.data import Groups
from nybble.errors import CannotRunError, InputError, StoppedError
from nybble.hardware import Device, PeakMemory
from nybble.nn.dropout_seed import DropoutSeeds
from nybble.recipe import StepMemory, TrainingSection
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Observer
from nybble.training.arguments import trackers, training_arguments
from nybble.training.callbacks import Checks, CountingBatch, Drawn, Logbook, Stops
from nybble.training.continuation import Checkpointing
from nybble.training.depth import recomputation_for
from nybble.training.evaluate import batches_for
from nybble.training.health import Health
from nybble.training.saving import Resumed, Saver
from nybble.training.witness import software_versions


@dataclass(frozen=True)
class TrainResult:
    """What training measured."""

    train_loss: float  # mean over all steps
    steps: int
    tokens: int
    seconds: float
    seconds_to_first_step: float | None  # from the start of training, loading not counted
    peak_bytes: int
    skipped_steps: int = 0  # whose loss or gradient was bad
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
    memory: StepMemory | None = None  # what a step takes at each depth of recomputation; None: all is recomputed
    checkpointing: Checkpointing | None = None  # None: none are written
    deadline: float | None = None  # by the monotonic clock
    processes: Processes = Processes()  # noqa: RUF009 - a value

    @property
    def resumed(self) -> Resumed | None:
        """What the training goes on from."""
        return self.checkpointing.resumed if self.checkpointing else None


def train_model(model: Any, tokenizer: Any, groups: Groups, section: TrainingSection, setup: Setup) -> TrainResult:
    """Train `model` in place on rows, which are drawn group by group.

    Raises:
        InputError: loss or gradient are no numbers any more, or the gradient spikes.
        StoppedError: a signal came, or the time is up; the state is saved.
        CannotRunError: out of memory, the device is lost, or a stopped state cannot be saved.
    """
    from transformers.trainer_callback import PrinterCallback

    from nybble.models.lora_linear import share_seeds  # brings PEFT
    from nybble.training.steps import StepTrainer

    run, processes = setup.run, setup.processes
    run.warn = setup.observer.note
    batches = CountingBatch(batches_for(model, tokenizer))
    logbook = Logbook(run, setup.observer, PeakMemory(setup.device), batches, processes)
    health = Health(section, batches, groups.rows, setup.observer.note, processes)
    saver = _saver(section, setup)
    checks = Checks(setup.check_every, setup.check)
    stops = Stops(setup.deadline, lambda: saver.seconds, processes)
    share_seeds(model, seeds := DropoutSeeds(section.seed))
    done, saved_in = setup.checkpointing, run.checkpoints if setup.checkpointing else None
    trainer = StepTrainer(
        seeds,
        recomputation_for(model, section, setup.device, setup.memory, processes.beside_on(setup.device.type)),
        setup.observer.note,
        section.parity_steps,
        saver=saver,
        resumed=setup.resumed,
        about={"recipe": done.recipe if done else {}, "versions": software_versions()},
        health=health,
        counters={"logbook": logbook},
        processes=processes,
        model=model,
        args=training_arguments(section, saved_in, setup.device, setup.compute_dtype, setup.max_steps),
        train_dataset=Drawn(groups),
        data_collator=batches,
        callbacks=[logbook, checks, stops, *_tensorboard(section, setup)],
    )
    trainer.remove_callback(PrinterCallback)
    if setup.resumed is not None:
        run.drop_lines_after(setup.resumed.step)
    logbook.accumulation = lambda: trainer.current_gradient_accumulation_steps
    checks.log = trainer.log
    with stops, _said_plainly(setup.device, saver), _deterministic(section.deterministic):
        outcome = trainer.train(str(setup.resumed.path) if setup.resumed else None)
        saver.close()
    _check_ending(trainer, health, stops, saver, section)
    return TrainResult(
        train_loss=float(outcome.training_loss),
        steps=trainer.state.global_step,
        tokens=logbook.tokens,
        seconds=logbook.seconds,
        seconds_to_first_step=logbook.seconds_to_first_step,
        peak_bytes=logbook.peak_bytes,
        skipped_steps=health.skipped,
        notes=trainer.notes(),
    )


def _saver(section: TrainingSection, setup: Setup) -> Saver:
    done = setup.checkpointing
    if done is None or not setup.processes.is_main:
        return Saver((), section.save_total_limit, dict, setup.observer.note)
    return Saver(
        done.parents,
        section.save_total_limit,
        lambda: done.identity().to_json(),
        setup.observer.note,
        done.resumed.path if done.resumed else None,
        done.damaged,
    )


@contextmanager
def _deterministic(is_wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms where it has them, while training; cuBLAS needs a variable, too (docs)."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if is_wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def _said_plainly(device: Device, saver: Saver) -> Iterator[None]:
    """What a device does to a training, as an error with the way on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        saver.finish()
        raise CannotRunError(
            f"out of memory on {device.name}; use --memory_budget, a smaller --per_device_train_batch_size (with more "
            f"--gradient_accumulation_steps), or a shorter --max_length; {saver.way_on}"
        ) from error
    except RuntimeError as error:
        saver.finish()
        if not is_device_loss(error):
            raise
        line = str(error).strip().partition("\n")[0].rstrip(".")
        raise CannotRunError(f"{device.name} is lost ({line}); see `nybble doctor`; {saver.way_on}") from error


def is_device_loss(error: RuntimeError) -> bool:
    """Whether torch says that the device, not the program, failed."""
    return isinstance(error, torch.AcceleratorError) or any(
        word in str(error) for word in ("CUDA error", "HIP error", "hipError", "device lost", "device-side")
    )


def _check_ending(trainer: Any, health: Health, stops: Stops, saver: Saver, section: TrainingSection) -> None:
    """Raise what made training end early."""
    health.read()
    if health.bad is not None:
        raise InputError(
            f"{health.bad.in_words}; look at those rows, lower --learning_rate ({section.learning_rate}) or "
            f"--max_grad_norm, or leave such batches out with --bad_batch skip; {saver.way_on}"
        )
    if stops.reason is None or trainer.state.global_step >= trainer.state.max_steps:
        return
    at = f"{stops.reason} at step {trainer.state.global_step} of {trainer.state.max_steps}"
    if saver.refusal is not None:
        raise CannotRunError(f"{at}, and its state could not be saved ({saver.refusal}); {saver.way_on}")
    raise StoppedError(f"{at}: saved; go on with --resume")


def _tensorboard(section: TrainingSection, setup: Setup) -> list[Any]:
    if "tensorboard" not in trackers(section) or not setup.processes.is_main:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    first = setup.resumed.step + 1 if setup.resumed else None
    return [TensorBoardCallback(SummaryWriter(str(setup.run.path / "tensorboard"), purge_step=first))]
