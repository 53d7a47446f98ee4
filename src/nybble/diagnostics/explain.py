"""Explain errors of drivers and libraries: the cause, one command, and a reference."""

from __future__ import annotations

import re

# Pattern in an error, its meaning, a command, and the discussion that describes it.
_KNOWN = (
    (
        r"hipErrorNoBinaryForGpu|invalid device function|no kernel image",
        "torch has no kernels for this GPU",
        "nybble doctor --quick  # names the wheel for it",
        "pytorch/pytorch#164346",
    ),
    (
        r"out of memory|OutOfMemory",
        "the device's memory is full",
        "amd-smi process  # or nvidia-smi; then end the process that uses it",
        "",
    ),
    (r"devices? (is|are) busy|unavailable|EBUSY", "another process uses the device", "amd-smi process", ""),
    (
        r"permission denied|hipErrorNoDevice|no ROCm-capable device",
        "there is no device, or this user has no permission to open it",
        "sudo usermod -aG render,video $USER  # then log in again",
        "ROCm/legacy-rocm-build#3072",
    ),
    (
        r"page fault|illegal memory access|HW Exception|GPU Hang|SIGABRT",
        "the GPU faulted",
        "sudo reboot  # a GPU that has faulted may fault again",
        "ROCm/legacy-rocm-build#6600",
    ),
    (r"sees no GPU", "", "nybble doctor --device cpu", ""),
    (
        r"[Cc] compiler|Python\.h|gcc",
        "Triton needs a C compiler for its launcher and found none",
        "sudo apt install gcc python3-dev",
        "",
    ),
)


def explain(error: str) -> tuple[str, str, str]:
    """The cause, fix and reference of an error; an unknown error is its own cause, with "" for the others."""
    for pattern, meaning, fix, thread in _KNOWN:
        if re.search(pattern, error):
            return (f"{meaning} ({error})" if meaning else error), fix, thread
    return error, "", ""
