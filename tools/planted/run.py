"""Faults planted one by one in a copy of the source: the tests of `make test` must fail for each.

    python -m tools.planted.run [AREA ..]

Each fault is one line as a tired author may write it: it raises no error and most results stay plausible. For each, the
tests that are named beside it run on a copy of this checkout, first without any fault, when they must pass. Every one
of these tests belongs to `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHARED = os.environ.get("NYBBLE_SHARED_DATA", str(ROOT.parent / "shared" / "data"))  # tests on real models look there
C_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-shared", "-fPIC")


class Fault(NamedTuple):
    """One changed line, and the tests that must notice it."""

    area: str
    what: str
    file: str
    right: str  # stands in the file exactly once
    wrong: str
    tests: str  # arguments of pytest


FAULTS = (
    Fault(
        "training loop",
        "a step divides by the learned tokens of its first micro-batch",
        "src/nybble/training/loop.py",
        "t.processes.sum(sum(batch.n_learned for batch in micro_batches))",
        "t.processes.sum(micro_batches[0].n_learned)",
        "tests/e2e/test_equivalence.py -k splitting",
    ),
    Fault(
        "resume",
        "the sum of losses that were not logged yet is lost",
        "src/nybble/training/state.py",
        '        self.unlogged_loss.copy_(loss["unlogged"])\n',
        "",
        "tests/contract/test_resume.py -k undisturbed",
    ),
    Fault(
        "several processes",
        "gradients are a mean over the processes instead of a sum",
        "src/nybble/training/loop.py",
        "return loss.float() * t.processes.count",
        "return loss.float()",
        "tests/e2e/test_processes.py -k what_one_does",
    ),
    Fault(
        "4-bit encoding",
        "full blocks are divided by their scale instead of multiplied by its inverse",
        "src/nybble/quant/blockwise.py",
        "blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)",
        "blocks / absmax.clamp(min=_TINY).unsqueeze(1)",
        "tests/reference/test_blockwise.py tests/reference/test_golden_slices.py",
    ),
    Fault(
        "attention in C",
        "a sliding window sees one token more",
        "csrc/attention.c",
        "int64_t last = b->window >= VECTOR - first ? VECTOR : first + b->window;",
        "int64_t last = b->window >= VECTOR - first ? VECTOR : first + b->window + 1;",
        "tests/reference/test_attention.py",
    ),
    Fault(
        "Triton kernels",
        "logits behind the vocabulary count as 0 in a row's softmax",
        "src/nybble/kernels/pointwise/triton_kernels.py",
        'logit = tl.where(live, logit, float("-inf"))',
        "logit = tl.where(live, logit, 0.0)",
        "tests/reference/test_pointwise.py",
    ),
    Fault(
        "masks",
        "an answer's first token is not learned",
        "src/nybble/data/encode.py",
        "labels[first:end] = ids[first:end]",
        "labels[first + 1 : end] = ids[first + 1 : end]",
        "tests/unit/test_masks.py",
    ),
    Fault(
        "planning",
        "the optimizer's state counts half",
        "src/nybble/planning/phases.py",
        'parts["optimizer"] = int(scale * parts["optimizer"])',
        'parts["optimizer"] = int(scale * parts["optimizer"] / 2)',
        "tests/reference/test_planning.py tests/e2e/test_plan.py",
    ),
    Fault(
        "checkpoints",
        "files of the right size are trusted whatever they hold",
        "src/nybble/storage/manifest.py",
        'if sha256_of(file) != entry.get("sha256"):',
        "if False:",
        "tests/unit/test_checkpoints.py tests/unit/test_storage.py",
    ),
    Fault(
        "merging",
        "an adapter is added without its scale",
        "src/nybble/exporting/arithmetic.py",
        "torch.addmm(weight.float(), b, a, alpha=self.scalings[module])",
        "torch.addmm(weight.float(), b, a)",
        "tests/e2e/test_merge.py",
    ),
    Fault(
        "comparison",
        "the variance of a loss divides by n instead of n - 1",
        "src/nybble/intervals.py",
        "math.sqrt(n / (n - 1) * squares)",
        "math.sqrt(squares)",
        "tests/unit/test_intervals.py tests/unit/test_comparison.py",
    ),
    Fault(
        "recipe",
        "a size in GiB is read as GB",
        "src/nybble/units.py",
        '"gi": 2**30',
        '"gi": 10**9',
        "tests/unit/test_units.py tests/unit/test_sizes.py",
    ),
    Fault(
        "errors",
        "what cannot run here ends with the code of wrong input",
        "src/nybble/errors.py",
        "    exit_code = 3",
        "    exit_code = 2",
        "tests/e2e/test_errors.py",
    ),
)


def main() -> int:
    """Plant each fault, run its tests, and print one JSON object; return 1 if a fault was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("areas", nargs="*", choices=[[], *(fault.area for fault in FAULTS)], metavar="AREA")
    wanted = parser.parse_args().areas
    outcomes = {fault.area: outcome(fault) for fault in FAULTS if not wanted or fault.area in wanted}
    print(json.dumps(outcomes, indent=1))
    return 0 if all(o["passes_without"] and o["fails_with"] for o in outcomes.values()) else 1


def outcome(fault: Fault) -> dict[str, object]:
    """Whether the fault's tests pass without it and fail with it.

    Raises:
        ValueError: the line to change does not stand in the file exactly once.
    """
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "nybble"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "runs"))
        passes = run_tests(copy, fault.tests) == 0
        file = copy / fault.file
        text = file.read_text(encoding="utf-8")
        if text.count(fault.right) != 1:
            raise ValueError(f"{fault.file} holds {fault.right!r} {text.count(fault.right)} times, not once")
        file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
        if file.suffix == ".c":
            build(copy)
        code = run_tests(copy, fault.tests)
        print(f"{fault.area}: {fault.what}: {'noticed' if code == 1 else f'NOT NOTICED ({code})'}", file=sys.stderr)
    return {"what": fault.what, "tests": fault.tests, "passes_without": passes, "fails_with": code == 1}


def run_tests(copy: Path, tests: str) -> int:
    """pytest's exit code: 0 if all pass, 1 if some fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *split(tests)]
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}", "NYBBLE_SHARED_DATA": SHARED}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def split(tests: str) -> list[str]:
    """The words of `tests`; what follows `-k` is one expression."""
    paths, _, expression = tests.partition(" -k ")
    return [*paths.split(), *(["-k", expression] if expression else [])]


def build(copy: Path) -> None:
    """Compile the copy's native library in its place."""
    for old in (copy / "src/nybble/kernels").glob("_native*"):
        old.unlink()
    library = copy / f"src/nybble/kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = os.environ.get("CC", "cc")
    sources = [str(path) for path in sorted((copy / "csrc").glob("*.c"))]
    subprocess.run([compiler, *C_FLAGS, *sources, "-o", str(library)], check=True)


if __name__ == "__main__":
    sys.exit(main())
