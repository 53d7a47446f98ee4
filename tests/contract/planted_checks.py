"""A table of checks for the doctor's child processes, in which each thing that can go wrong does."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from nybble.diagnostics.checks import Check
from nybble.diagnostics.measure import CheckOutcome


def _fine(_device: torch.device, _path: str) -> CheckOutcome:
    sys.stdout.write("libraries print on stdout\n")
    return CheckOutcome(0.5, {"process": float(os.getpid())})


def _hang(_device: torch.device, path: str) -> CheckOutcome:
    if path in ("", "native"):
        time.sleep(600)
    return CheckOutcome(0.0)


def _crash(_device: torch.device, _path: str) -> CheckOutcome:
    sys.stderr.write("Memory access fault by GPU node-1\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
    return CheckOutcome(0.0)


def _leave(_device: torch.device, _path: str) -> CheckOutcome:
    os._exit(7)


def _nan(_device: torch.device, _path: str) -> CheckOutcome:
    return CheckOutcome(float("nan"))


def _raise(_device: torch.device, _path: str) -> CheckOutcome:
    raise RuntimeError("HIP error: invalid device function")


def _full(_device: torch.device, _path: str) -> CheckOutcome:
    raise torch.OutOfMemoryError("HIP out of memory")


def _far(_device: torch.device, path: str) -> CheckOutcome:
    return CheckOutcome(9.0 if path == "native" else 0.0)


CHECKS = (
    Check("before", _fine, 1.0),
    Check("hang", _hang, 1.0, "it stands still", "export A=1", "a/b#1", limit_seconds=1.0),
    Check("after hang", _fine, 1.0),
    Check("crash", _crash, 1.0, "it dies", "export B=1", "a/b#2"),
    Check("after crash", _fine, 1.0),
    Check("leave", _leave, 1.0, "it leaves", "export C=1"),
    Check("nan", _nan, 1.0, "no number", "export D=1"),
    Check("raise", _raise, 1.0, "it complains", "export E=1"),
    Check("full", _full, 1.0, "no room", "export F=1"),
    Check("ladder, hanging", _hang, 1.0, "slow", "x --path {operator}=torch", "", "gemv_4bit", limit_seconds=1.0),
    Check("ladder, wrong", _far, 1.0, "wrong", "x --path {operator}=torch", "", "dequantize_4bit"),
    Check("ladder, right", _fine, 1.0, operator="dequantize_4bit"),
)
