"""The rows of an optimizer step: how many there are, and how they are split into micro-batches and among processes.

As in transformers, a step has per_device_train_batch_size x gradient_accumulation_steps x processes rows. Where
train_batch_size is set, a step has that many rows whatever the number of processes, and the accumulation follows.
"""

from __future__ import annotations

from nybble.errors import RecipeError
from nybble.recipe.schema import TrainingSection


def rows_per_step(training: TrainingSection, n_processes: int) -> int:
    """Rows of an optimizer step, over all micro-batches and processes."""
    per_process = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return training.train_batch_size or per_process * n_processes


def for_one_process(training: TrainingSection, n_processes: int) -> TrainingSection:
    """The settings of one of `n_processes`: rows of its micro-batches, and how many of them make its part of a step.

    Raises:
        RecipeError: train_batch_size cannot be divided among the processes.
    """
    if training.train_batch_size is None:
        return training
    share, rest = divmod(training.train_batch_size, n_processes)
    if rest:
        raise RecipeError(
            f"train_batch_size {training.train_batch_size} cannot be divided among {n_processes} processes; make it a "
            f"multiple of {n_processes}, or start another number of processes"
        )
    most = min(training.per_device_train_batch_size, share)
    size = next(size for size in range(most, 0, -1) if share % size == 0)
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    return training.model_copy(update={**split, "train_batch_size": None})


def in_micro_batches(training: TrainingSection, size: int) -> TrainingSection:
    """The same steps of one process, in micro-batches of `size` rows; a size that divides the former one."""
    n_parts = training.per_device_train_batch_size // size
    accumulated = training.gradient_accumulation_steps * n_parts
    return training.model_copy(
        update={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated} if n_parts > 1 else {}
    )


def step_in_words(training: TrainingSection, n_processes: int) -> str:
    """How many rows a step has, and which rule says so."""
    rows, own = rows_per_step(training, n_processes), for_one_process(training, n_processes)
    size, accumulated = own.per_device_train_batch_size, own.gradient_accumulation_steps
    processes = "1 process" if n_processes == 1 else f"{n_processes} processes"
    if training.train_batch_size is not None:
        return f"{rows} rows per step, fixed by train_batch_size: {size} rows x {accumulated} x {processes}"
    return (
        f"{rows} rows per step: per_device_train_batch_size {size} x gradient_accumulation_steps {accumulated} x "
        f"{processes}"
    )
