"""Whether a run on this machine would lose nothing: its first steps, undisturbed and interrupted, compared bit by bit.

The steps are trained twice in processes of their own. The second time the process is told to stop after a third of
them, resumed, killed after two thirds, and resumed again. On a CPU both must end in the same bits; on a GPU as far as
torch has deterministic algorithms for the model (they are asked for).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from nybble.errors import CannotRunError, InputError, NybbleError
from nybble.pipeline import rehearse
from nybble.recipe import Recipe, load_recipe, save_recipe
from nybble.run.directory import read_lines
from nybble.run.record import Observer, Silent
from nybble.storage.atomic import write_text
from nybble.storage.checkpoints import Place, list_checkpoints

_CHILD = "import sys; from nybble.resume_check import child; sys.exit(child(sys.argv[1], len(sys.argv) > 2))"
_LOOKS = 0.02  # seconds between two looks at what a process has done
_COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@dataclass(frozen=True)
class ResumeCheck:
    """What was compared, and what was found."""

    identical: bool
    steps: int
    interruptions: tuple[str, ...]  # where the second training was
    n_tensors: int  # weights, optimizer, generators
    different: tuple[str, ...]  # tensors, or logged figures
    largest_difference: float  # of any element
    seconds: float


def resume_check(run_dir: Path | str, *, steps: int = 12, observer: Observer | None = None) -> ResumeCheck:
    """Train the first `steps` of a run again, undisturbed and interrupted, and compare.

    Raises:
        InputError: it is no run, or so few steps that nothing can be interrupted.
        CannotRunError: a training failed, with what it said.
    """
    file = Path(run_dir).expanduser() / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{run_dir} is no run directory (no recipe.yaml); give the output_dir of a `nybble train`")
    if steps < 3:
        raise InputError(f"--steps {steps}: at least 3 are needed to interrupt in between")
    recipe, watch, began = load_recipe(file), observer or Silent(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        straight, disturbed = Path(name) / "straight", Path(name) / "disturbed"
        watch.stage("undisturbed")
        _finish(_start(recipe, straight, steps), straight)
        watch.stage("interrupted")
        interruptions = _disturb(recipe, disturbed, steps)
        different, n_tensors, largest = _compare(straight, disturbed)
    if not interruptions:
        raise InputError(f"{steps} steps are over before they can be interrupted; give more with --steps")
    seconds = time.monotonic() - began
    return ResumeCheck(not different, steps, tuple(interruptions), n_tensors, tuple(different), largest, seconds)


def _disturb(recipe: Recipe, out: Path, steps: int) -> list[str]:
    """Stop it, resume it, kill it, resume it; where it was interrupted."""
    found = []

    def has_logged() -> bool:
        return len(read_lines(out / "events.jsonl")) >= steps // 3

    def has_saved() -> bool:
        newest = next(iter(list_checkpoints([out / "checkpoints"])), None)
        return newest is not None and (Place.of(newest) or Place(0)).step >= 2 * steps // 3

    process = _start(recipe, out, steps)
    for number, ready in ((signal.SIGTERM, has_logged), (signal.SIGKILL, has_saved)):
        if _wait_until(ready, process):
            process.send_signal(number)
            process.wait()
            newest = next(iter(list_checkpoints([out / "checkpoints"])), None)
            found.append(f"{number.name}, then on from {newest.name if newest else 'the beginning'}")
            process = _start(recipe, out, steps, resume=True)
    _finish(process, out)
    return found


def _start(recipe: Recipe, out: Path, steps: int, resume: bool = False) -> subprocess.Popen[bytes]:
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
    # Read by cuBLAS when it starts.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}
    command = [sys.executable, "-c", _CHILD, str(file), *(["resume"] if resume else [])]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, env=environment)  # noqa: S603


def child(recipe_file: str, resume: bool) -> int:
    """What the processes run; the exit code."""
    try:
        rehearse(load_recipe(recipe_file), resume=resume)
    except NybbleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether it came before the process was over."""
    while process.poll() is None:
        if ready():
            return True
        time.sleep(_LOOKS)
    return False


def _finish(process: subprocess.Popen[bytes], out: Path) -> None:
    if process.wait() != 0:
        said = out.with_suffix(".log").read_text(errors="replace").strip().splitlines() or ["nothing said"]
        raise CannotRunError(f"the training ended with code {process.returncode}: {said[-1]}")


def _compare(straight: Path, disturbed: Path) -> tuple[list[str], int, float]:
    """What differs, how many tensors there are, and the largest difference."""
    ours, theirs = (_tensors(out) for out in (disturbed, straight))
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
