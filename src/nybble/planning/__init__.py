"""The plan of a run: steps and sizes that follow from recipe and rows."""

from __future__ import annotations

import math

from nybble.recipe import Plan, TrainingSection


def make_plan(training: TrainingSection, n_rows: int) -> Plan:
    """What the run will do with `n_rows` training rows.

    A last, smaller batch of an epoch is a step too, as in transformers.
    """
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    micro_batches = math.ceil(n_rows / training.per_device_train_batch_size)
    steps_per_epoch = max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))
    by_epochs = math.ceil(training.num_train_epochs * steps_per_epoch)
    return Plan(
        rows=n_rows,
        rows_per_step=rows_per_step,
        optimizer_steps=training.max_steps if training.max_steps > 0 else by_epochs,
        gradient_checkpointing=training.gradient_checkpointing,
        predicted_bytes={},
    )
