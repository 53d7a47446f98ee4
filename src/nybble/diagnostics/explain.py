"""What libraries' errors mean: cause, one command, thread."""

from __future__ import annotations

import re

# Pattern in an error -> what it means, what to do, where it is known from.
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
        "amd-smi process  # or nvidia-smi: end what holds it",
        "",
    ),
    (r"devices? (is|are) busy|unavailable|EBUSY", "the device is taken by another process", "amd-smi process", ""),
    (
        r"permission denied|hipErrorNoDevice|no ROCm-capable device",
        "the device may not be opened, or none is there",
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
        "Triton finds no C compiler for its launcher",
        "sudo apt install gcc python3-dev",
        "",
    ),
)


def explain(error: str) -> tuple[str, str, str]:
    """Cause, fix and thread of an error; fix and thread are "" where it is not known."""
    for pattern, meaning, fix, thread in _KNOWN:
        if re.search(pattern, error):
            return (f"{meaning} ({error})" if meaning else error), fix, thread
    return error, "", ""
