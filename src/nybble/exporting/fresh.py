"""A process of its own for what is to be proven: the script gets files, and nothing of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, NybbleError


def run_fresh(script: str, subject: Path, *files: Path, device: str = "cpu") -> dict[str, Any]:
    """What `script` (beside this file) writes to the last of `files`, when asked about `subject`.

    Raises:
        CannotRunError: it runs out of memory, or lacks a library.
        NybbleError: it cannot read `subject`, or was not free of this package.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(Path(__file__).with_name(script)), str(subject), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode < 0 or "OutOfMemoryError" in done.stderr:
        raise CannotRunError(f"the verifying process ran out of memory on {subject}; free memory and try again")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode and "ImportError" in done.stderr:
        raise CannotRunError(f"the verifying process lacks a library: {last[:300]}")
    if done.returncode:
        raise NybbleError(f"stock transformers cannot read what was written to {subject}: {last[:300]}")
    answers: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    if answers["foreign"]:
        raise NybbleError("the verifying process holds modules of nybble itself; its figures prove nothing")
    return answers
