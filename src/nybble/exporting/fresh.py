"""Asks stock libraries, in an interpreter that imports nothing of Nybble, what they make of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, NybbleError
from nybble.subprocesses import Child


def run_fresh(script: str, subject: Path, *files: Path, device: str = "cpu") -> dict[str, Any]:
    """Run `script`, which is next to this file, on `subject` and `files`; return the JSON object that it prints.

    Raises:
        CannotRunError: the process ran out of memory, or a library is missing.
        NybbleError: the script cannot read `subject`, or it imported something of this package.
    """
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    arguments = ["-I", str(Path(__file__).with_name(script)), str(subject), *map(str, files)]
    with Child(arguments, environment=environment) as child:
        ending = child.wait()
    if ending.code < 0 or "OutOfMemoryError" in ending.stderr:
        raise CannotRunError(f"the verifying process ran out of memory on {subject}; free memory and try again")
    last = (ending.last_line or "no message")[:300]
    if ending.code and "ImportError" in ending.stderr:
        raise CannotRunError(f"the verifying process lacks a library: {last}")
    if ending.code or ending.result is None:
        raise NybbleError(f"stock transformers cannot read what was written to {subject}: {last}")
    if ending.result["foreign"]:
        raise NybbleError("the verifying process imported modules of nybble, so its figures prove nothing")
    return ending.result
