"""The rows of an optimizer step: how they are split into micro-batches and among processes."""

from __future__ import annotations

from nybble.errors import RecipeError
from nybble.recipe.schema import TrainingSection


def in_micro_batches(training: TrainingSection, size: int) -> TrainingSection:
    """The same steps, `size` rows going through the model at a time; a size that divides the batch."""
    n_parts = training.per_device_train_batch_size // size
    accumulated = training.gradient_accumulation_steps * n_parts
    return training.model_copy(
        update={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated} if n_parts > 1 else {}
    )


def shared_among(training: TrainingSection, n_processes: int) -> TrainingSection:
    """One process's share of the same steps, in micro-batches as large as divide it.

    Raises:
        RecipeError: the rows of a step cannot be shared evenly.
    """
    most, n_rows = training.per_device_train_batch_size, step_rows(training)
    share, rest = divmod(n_rows, n_processes)
    if rest:
        raise RecipeError(
            f"the {n_rows} rows of a step (per_device_train_batch_size {most} x gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps}) cannot be shared by {n_processes} processes; make their product "
            f"a multiple of {n_processes}, or start another number of processes"
        )
    size = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
    return training.model_copy(
        update={"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    )


def step_rows(training: TrainingSection) -> int:
    """Rows of an optimizer step, over all micro-batches and processes."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps
