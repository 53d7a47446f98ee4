"""What checkpoints cost the step: the same training with and without them, on a model of about 168M weights.

A Llama of random weights (hidden 1024, 8 layers, vocabulary 32,000) in 4 bits, r=16 on all linears, 32 bundled rows a
step. The arms take turns in one process: no checkpoint but the last, one every ten steps, one every step. Seconds a
step are from the logged steps, the first one left out; processor seconds are those of the process, its writing thread
included. `copy` and `write` are processor seconds of a checkpoint in the training thread and in the one that writes:
unlike the others they hardly depend on what else the machine does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.harness import Figures, Option, medians, print_table, run
from bench.models import write_llama
from nybble import bundled
from nybble.pipeline import train_without_evaluation
from nybble.recipe import load_recipe
from nybble.run.directory import read_lines
from nybble.run.quiet import quiet_libraries
from nybble.run.record import Silent, StepEvent
from nybble.storage.checkpoints import list_checkpoints
from nybble.training.checkpoint import CheckpointWriter

ARMS = {"none": 1_000_000, "every 10 steps": 10, "every step": 1}


class ProcessorClock(Silent):
    """Reads the process's clock at each logged step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def step(self, event: StepEvent) -> None:
        """Read it."""
        self.at.append(time.process_time())


def train(base: Path, out: Path, save_steps: int, steps: int) -> Figures:
    """Train once."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(base),
        "dataset_name": str(bundled.train_rows_path()),
        "output_dir": str(out),
        "device": "cpu",
        "eval_fraction": 0,
        "per_device_train_batch_size": 32,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": save_steps,
        "report_to": "none",
    }
    copies: list[float] = []
    writes: list[float] = []
    save, write = CheckpointWriter.save, CheckpointWriter._write

    def timed(method: Any, into: list[float]) -> Any:
        def call(self: Any, *given: Any) -> Any:
            began = time.thread_time()
            result = method(self, *given)
            into.append(time.thread_time() - began)
            return result

        return call

    CheckpointWriter.save = timed(save, copies)
    CheckpointWriter._write = timed(write, writes)
    clock = ProcessorClock()
    try:
        train_without_evaluation(load_recipe(None, settings), observer=clock)
    finally:
        CheckpointWriter.save, CheckpointWriter._write = save, write
    events = read_lines(out / "events.jsonl")
    newest = list_checkpoints([out / "checkpoints"])[0]
    return {
        "step_seconds": (events[-1]["seconds"] - events[0]["seconds"]) / (steps - 1),
        "processor_seconds": (clock.at[-1] - clock.at[0]) / (steps - 1),
        "copy_seconds": statistics.median(copies),
        "write_seconds": statistics.median(writes),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


@quiet_libraries()
def measure(asked: Namespace) -> dict[str, Any]:
    """Every arm."""
    torch.set_num_threads(asked.threads)
    number = count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_llama(folder / "base", asked.hidden, asked.layers, bundled.base_path())
        sides = {
            arm: lambda save_steps=save_steps: train(base, folder / f"run-{next(number)}", save_steps, asked.steps)
            for arm, save_steps in ARMS.items()
        }
        arms = medians(sides, asked.repeats, warm_up=False)
    none = arms["none"]
    print_table(
        "checkpoints | s a step | x | processor s a step | x | copy, ms | write, ms",
        (
            (
                arm,
                f"{f['step_seconds']:.3f}",
                f"{f['step_seconds'] / none['step_seconds']:.4f}",
                f"{f['processor_seconds']:.3f}",
                f"{f['processor_seconds'] / none['processor_seconds']:.4f}",
                f"{1000.0 * f['copy_seconds']:.1f}",
                f"{1000.0 * f['write_seconds']:.1f}",
            )
            for arm, f in arms.items()
        ),
    )
    return {"arms": arms}


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("steps", 20, tiny=3),
        Option("repeats", 3, tiny=1),
        Option("threads", 2, tiny=1),
        Option("hidden", 1024, tiny=128),
        Option("layers", 8, tiny=1),
    )
