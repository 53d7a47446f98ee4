"""Kill trainings at random moments and resume them until they are complete: each must equal the undisturbed one.

    python -m tools.chaos.run [--runs 200] [--kills N] [--seed 0] [--keep FOLDER]

Each run trains adapters on the bundled 4-bit base: two epochs and a half of 14 rows, three micro-batches a step, a
checkpoint every two steps, dropout on. Each is a separate process, killed by SIGKILL up to three times at moments drawn
at random from its whole length, and resumed each time. Every file of a checkpoint is written slowly on purpose, so that
many kills fall into a write. Compared are the bytes of the adapter, every tensor of the last checkpoint
(optimizer, generators), its counters, and the loss, gradient norm and rate of every step.

Processes are forked from one that has imported everything. The plan, which takes longer than the training and writes
nothing, is computed once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.harness import witness
from nybble import bundled, pipeline, preparation
from nybble.recipe import load_recipe
from nybble.run.quiet import quiet_libraries
from nybble.run.record import Silent
from nybble.storage import checkpoints
from nybble.storage.atomic import sha256_of
from nybble.storage.checkpoints import list_checkpoints

SETTINGS = {
    "model_name_or_path": str(bundled.base_path()),
    "dataset_name": str(bundled.train_rows_path()),
    "device": "cpu",
    "max_train_rows": 14,
    "eval_fraction": 0,
    "n_samples": 0,
    "r": 4,
    "target_modules": "q_proj,v_proj",
    "lora_dropout": 0.1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 8,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
}
MOST_KILLS = 3  # of one run
PAUSE = 0.1  # seconds in the middle of each file of a checkpoint
NAMES = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@quiet_libraries()
def main() -> int:
    """Run, compare, and print one JSON object; return 1 if a run ended differently from the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, help="stop after this many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs that differ")
    arguments = parser.parse_args()
    began, rng = time.monotonic(), random.Random(arguments.seed)
    figures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan_once(SETTINGS, folder)
        started = time.monotonic()
        if train(folder / "undisturbed", False).wait() != 0:
            raise SystemExit((folder / "undisturbed.err").read_text())
        length = time.monotonic() - started
        expected = everything(folder / "undisturbed")
        differing: list[str] = []
        for number in range(arguments.runs):
            if arguments.kills is not None and figures["kills"] >= arguments.kills:
                break
            out = folder / f"run-{number}"
            while not disturb(out, rng, length, figures):
                shutil.rmtree(out)  # it was complete before its first kill
            figures["runs"] += 1
            found = everything(out)
            if found != expected:
                differing.append(f"{out.name}: {', '.join(key for key in expected if found.get(key) != expected[key])}")
                if arguments.keep:
                    shutil.copytree(out, arguments.keep / out.name)
            shutil.rmtree(out)
            print(f"{number + 1}/{arguments.runs}: {dict(figures)}", file=sys.stderr)
    found = {
        **figures,
        "identical": figures["runs"] - len(differing),
        "differing": differing,
        "seconds_undisturbed": round(length, 2),
        "seconds": round(time.monotonic() - began),
        "seed": arguments.seed,
    }
    print(json.dumps({**witness("chaos"), **found}))
    return bool(differing)


def disturb(out: Path, rng: random.Random, length: float, figures: Counter[str]) -> int:
    """Kill and resume a run until it is complete; return how often it was killed."""
    wanted, kills = rng.randint(1, MOST_KILLS), 0
    while True:
        process = train(out, (out / "run.json").is_file())
        if kills < wanted:
            time.sleep(rng.uniform(0.0, length))
            if process.kill():
                kills += 1
                figures["kills"] += 1
                figures["kills_within_a_checkpoint"] += any(out.glob("checkpoints/.*.partial"))
                figures["kills_before_the_first_checkpoint"] += not list_checkpoints([out / "checkpoints"])
                continue
        code = process.wait()
        if code != 0:
            raise SystemExit(f"{out.name} ended with {code}: {out.with_suffix('.err').read_text()}")
        return kills


class Process:
    """A forked training."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def kill(self) -> bool:
        """Kill it; return False if it had already ended."""
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if done:
            self._status = status
            return False
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        return True

    def wait(self) -> int:
        """Wait for its exit code."""
        if self._status is None:
            self._status = os.waitpid(self._pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)


def train(out: Path, resume: bool) -> Process:
    """Start or resume a training that writes its checkpoints slowly."""
    write = checkpoints._write

    def slowly(file: Path, content: bytes) -> dict[str, Any]:
        file.write_bytes(content[: len(content) // 2])
        time.sleep(PAUSE)
        return write(file, content)

    def run() -> None:
        checkpoints._write = slowly
        settings = {**SETTINGS, "output_dir": str(out)}
        pipeline.train(None, settings, on_existing="resume" if resume else "refuse", observer=None)

    return fork(run, out.with_suffix(".err"))


def fork(run: Callable[[], object], log: Path) -> Process:
    """Run in a forked process with the exit codes of the command line; an exception is written to `log`."""
    pid = os.fork()
    if pid:
        return Process(pid)
    code = 1
    try:
        run()
        code = 0
    except BaseException as error:  # noqa: BLE001 - of a forked process, whose parent reads it
        code = getattr(error, "exit_code", 1)
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def plan_once(settings: dict[str, Any], folder: Path) -> None:
    """Compute one plan and let every run use it."""
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and its loops would wait for them
    recipe = load_recipe(None, {**settings, "output_dir": str(folder / "plan")})
    run = preparation.open_run(recipe, observer=Silent())
    made = preparation.prepare(recipe, run).plan
    preparation.plan_training = lambda *_: made


def everything(out: Path) -> dict[str, Any]:
    """Everything that a run leaves, except times."""
    newest = list_checkpoints([out / "checkpoints"])[0]
    found: dict[str, Any] = {"adapter": sha256_of(out / "adapter" / "adapter_model.safetensors"), "last": newest.name}
    for file in sorted(newest.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.stem}:{name}"] = tensor.numpy().tobytes()
    state = json.loads((newest / "state.json").read_text())
    del state["counters"]["seconds"], state["recipe"], state["versions"]
    found["state"] = state
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    found["events"] = [[event[name] for name in NAMES] for event in events]
    record = json.loads((out / "run.json").read_text())
    found["record"] = [record["status"], record["train_loss"]]
    return found


if __name__ == "__main__":
    sys.exit(main())
