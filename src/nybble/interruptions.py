"""Checks that an interrupted run loses nothing on this machine: its first steps, trained twice, compared bit by bit.

Both trainings run in processes of their own. The second one is asked to stop after a third of the steps, resumed,
killed after two thirds, and resumed again. On a CPU both must end with the same bits; on a GPU this holds as far as
torch has deterministic algorithms for the model, which are requested.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from nybble.errors import CannotRunError, InputError, NybbleError
from nybble.pipeline import train_without_evaluation
from nybble.recipe import Recipe, load_recipe, save_recipe
from nybble.run.directory import read_lines
from nybble.run.progress import ObserverChoice, watching
from nybble.storage.atomic import write_text
from nybble.storage.checkpoints import Place, list_checkpoints
from nybble.subprocesses import Child, report_error

_SECONDS_BETWEEN_LOOKS = 0.02
_COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@dataclass(frozen=True)
class ResumeCheck:
    """What was compared, and the result."""

    identical: bool
    steps: int
    interruptions: tuple[str, ...]  # signal and checkpoint of each interruption of the second training
    n_tensors: int  # of weights, optimizer state and generators
    different: tuple[str, ...]  # names of tensors or logged figures that differ
    largest_difference: float  # between any two elements
    seconds: float


def resume_check(run_dir: Path | str, *, steps: int = 12, observer: ObserverChoice = "auto") -> ResumeCheck:
    """Train the first `steps` of a run twice, once undisturbed and once interrupted, and compare.

    Raises:
        InputError: `run_dir` is not a run, or there are too few steps to interrupt a training in between.
        CannotRunError: a training failed; the message says why.
    """
    file = Path(run_dir).expanduser() / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{run_dir} is not a run directory (no recipe.yaml); give the output_dir of a `nybble train`")
    if steps < 3:
        raise InputError(f"--steps {steps}: at least 3 are needed to interrupt in between")
    recipe = load_recipe(file)
    began = time.monotonic()
    with watching(observer) as watch, tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        disturbed = Path(name) / "disturbed"
        watch.stage("undisturbed")
        with _start(recipe, straight, steps) as process:
            _finish(process)
        watch.stage("interrupted")
        interruptions = _disturb(recipe, disturbed, steps)
        different, n_tensors, largest = _compare(straight, disturbed)
    if not interruptions:
        raise InputError(f"{steps} steps end before they can be interrupted; give more with --steps")
    return ResumeCheck(
        identical=not different,
        steps=steps,
        interruptions=tuple(interruptions),
        n_tensors=n_tensors,
        different=tuple(different),
        largest_difference=largest,
        seconds=time.monotonic() - began,
    )


def _disturb(recipe: Recipe, out: Path, steps: int) -> list[str]:
    """Train, stop it, resume it, kill it, and resume it again; return where it was interrupted."""
    interruptions: list[str] = []

    def has_logged() -> bool:
        return len(read_lines(out / "events.jsonl")) >= steps // 3

    def has_saved() -> bool:
        newest = next(iter(list_checkpoints([out / "checkpoints"])), None)
        return newest is not None and (Place.of(newest) or Place(0)).step >= 2 * steps // 3

    for number, is_ready in ((signal.SIGTERM, has_logged), (signal.SIGKILL, has_saved)):
        with _start(recipe, out, steps, resume=bool(interruptions)) as process:
            if not _wait_until(is_ready, process):
                _finish(process)
                return interruptions
            process.send_signal(number)
            process.wait()
        newest = next(iter(list_checkpoints([out / "checkpoints"])), None)
        interruptions.append(f"{number.name}, then resumed from {newest.name if newest else 'the start'}")
    with _start(recipe, out, steps, resume=True) as process:
        _finish(process)
    return interruptions


def _start(recipe: Recipe, out: Path, steps: int, resume: bool = False) -> Child:
    changes = {
        "output_dir": str(out),
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "deterministic": True,
        "max_seconds": None,
        "spare_dir": None,
    }
    recipe = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=changes),
            "evaluation": recipe.evaluation.model_copy(update={"eval_steps": 0, "n_samples": 0}),
        }
    )
    file = out.with_suffix(".yaml")
    write_text(file, save_recipe(recipe))
    arguments = ["-m", "nybble.interruptions", str(file), *(["resume"] if resume else [])]
    variable = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when it is loaded
    return Child(arguments, environment={variable: os.environ.get(variable, ":4096:8")})


def _train_in_child(recipe_file: str, resume: bool) -> int:
    """What a child process runs; the exit code."""
    try:
        train_without_evaluation(load_recipe(recipe_file), resume=resume)
    except NybbleError as error:
        report_error(error)
        return error.exit_code
    return 0


def _wait_until(is_ready: Callable[[], bool], process: Child) -> bool:
    """Wait; return whether it was ready before the process ended."""
    while process.is_running:
        if is_ready():
            return True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return False


def _finish(process: Child) -> None:
    ending = process.wait()
    if ending.code != 0:
        raise CannotRunError(f"the training ended with exit code {ending.code}: {ending.reason}")


def _compare(straight: Path, disturbed: Path) -> tuple[list[str], int, float]:
    """The names of what differs, the number of tensors, and the largest difference."""
    ours = _tensors(disturbed)
    theirs = _tensors(straight)
    different = sorted(ours.keys() ^ theirs.keys())
    largest = 0.0
    for name in sorted(ours.keys() & theirs.keys()):
        if not torch.equal(ours[name], theirs[name]):
            different.append(name)
            largest = max(largest, float((ours[name].double() - theirs[name].double()).abs().max()))
    logged = [read_lines(out / "events.jsonl") for out in (disturbed, straight)]
    different += [] if len(logged[0]) == len(logged[1]) else ["the number of logged steps"]
    for ours_then, theirs_then in zip(*logged, strict=False):
        keys = (key for key in _COMPARED if ours_then.get(key) != theirs_then.get(key))
        different += [f"{key} of step {theirs_then.get('step')}" for key in keys]
    return different, len(theirs), largest


def _tensors(out: Path) -> dict[str, torch.Tensor]:
    newest = list_checkpoints([out / "checkpoints"])[0]
    files = sorted(newest.glob("*.safetensors"))
    return {f"{file.stem}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    sys.exit(_train_in_child(sys.argv[1], resume=len(sys.argv) > 2))
