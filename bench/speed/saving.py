"""What checkpoints cost the step: the same training with and without them, on a model of about 168M weights.

    python -m bench.speed.saving [--steps 20] [--repeats 3] [--threads 2]

A Llama of random weights (hidden 1024, 8 layers, vocabulary 32,000) in 4 bits, r=16 on all linears, 32 bundled rows a
step. The arms take turns in one process: no checkpoint but the last, one every ten steps, one every step. Seconds a
step are from the logged steps, the first one left out; processor seconds are those of the process, its writing thread
with it. `copy` and `write` are processor seconds of a checkpoint in the training thread and in the one that writes:
unlike the others they hardly depend on what else the machine does. Ratios are of medians. Prints a table and one JSON
object last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nybble import bundled
from nybble.cli.flags import quiet_libraries
from nybble.pipeline import rehearse
from nybble.recipe import load_recipe
from nybble.run.directory import read_lines
from nybble.run.record import Silent, StepEvent
from nybble.storage.checkpoints import list_checkpoints
from nybble.training.resuming import ResumableTrainer
from nybble.training.saving import Saver
from tools.chaos.run import here

ARMS = {"none": 1_000_000, "every 10 steps": 10, "every step": 1}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        base = write_base(Path(name) / "base")
        for repeat in range(arguments.repeats):
            for arm in list(ARMS)[:: 1 if repeat % 2 == 0 else -1]:
                found[arm].append(measure(base, Path(name) / f"{arm}-{repeat}", arm, arguments.steps))
                print(f"{arm}: {found[arm][-1]}", file=sys.stderr)
    medians = {
        arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for arm, runs in found.items()
    }
    print("| checkpoints | s a step | x | processor s a step | x | copy, ms | write, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for arm, figures in medians.items():
        step, cpu = figures["step_seconds"], figures["cpu_seconds"]
        print(
            f"| {arm} | {step:.3f} | {step / medians['none']['step_seconds']:.4f} | {cpu:.3f} "
            f"| {cpu / medians['none']['cpu_seconds']:.4f} | {1e3 * figures['copy_seconds']:.1f} "
            f"| {1e3 * figures['write_seconds']:.1f} |"
        )
    print(json.dumps({"benchmark": "saving", **vars(arguments), "medians": medians, "runs": found, **here()}))


def write_base(folder: Path) -> Path:
    """The random base, with the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled.base_path()).save_pretrained(folder)
    return folder


class ProcessorClock(Silent):
    """Looks at the process's clock at each logged step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def step(self, event: StepEvent) -> None:
        """Look."""
        self.at.append(time.process_time())


def measure(base: Path, out: Path, arm: str, steps: int) -> dict[str, float]:
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
        "save_steps": ARMS[arm],
        "report_to": "none",
    }
    copies: list[float] = []
    writes: list[float] = []
    save, write = ResumableTrainer._save_checkpoint, Saver._write

    def timed(method: Any, into: list[float]) -> Any:
        def call(self: Any, *given: Any) -> Any:
            began = time.thread_time()
            result = method(self, *given)
            into.append(time.thread_time() - began)
            return result

        return call

    ResumableTrainer._save_checkpoint = timed(save, copies)
    Saver._write = timed(write, writes)
    clock = ProcessorClock()
    try:
        rehearse(load_recipe(None, settings), observer=clock)
    finally:
        ResumableTrainer._save_checkpoint, Saver._write = save, write
    events = read_lines(out / "events.jsonl")
    newest = list_checkpoints([out / "checkpoints"])[0]
    return {
        "step_seconds": (events[-1]["seconds"] - events[0]["seconds"]) / (steps - 1),
        "cpu_seconds": (clock.at[-1] - clock.at[0]) / (steps - 1),
        "copy_seconds": statistics.median(copies),
        "write_seconds": statistics.median(writes),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


if __name__ == "__main__":
    main()
