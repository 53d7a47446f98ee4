"""What several modules of reference tests use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Reads a file's name, calls the function that the file names, writes result and arguments (which it may have filled).
WORKER = """
import sys, torch
from importlib import import_module
for line in sys.stdin:
    module, name, arguments = torch.load(line.strip(), weights_only=False)
    torch.save((getattr(import_module(f"nybble.kernels.{module}"), name)(*arguments), arguments), line.strip())
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def triton_cache(run_folder: Path) -> Iterator[None]:
    """What one process of this test run compiled serves all; Triton keys it by source, target and options."""
    from triton import knobs

    before, knobs.cache.dir = knobs.cache.dir, str(run_folder / "triton")
    yield
    knobs.cache.dir = before


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Any, tuple[Any, ...]]]]:
    """Calls a function of a module of `nybble.kernels` where Triton interprets: its result, and its arguments then."""
    folder = tmp_path_factory.mktemp("interpreter")
    errors = folder / "errors"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with errors.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout
    file = folder / "call.pt"

    def run(module: str, name: str, *arguments: object) -> tuple[Any, tuple[Any, ...]]:
        torch.save((module, name, arguments), file)
        print(file, file=stdin, flush=True)
        assert stdout.readline() == "done\n", errors.read_text()[-2000:]
        result, after = torch.load(file, weights_only=False)
        return result, after

    yield run
    stdin.close()
    worker.wait(timeout=60)
    stdout.close()
