"""Variables that torch reads when it is imported: set or cleaned before that, only where needed, and said aloud."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping

from nybble.diagnostics.evidence import Evidence
from nybble.diagnostics.machine import Machine, read_torch_build
from nybble.diagnostics.wheels import ALLOCATOR_VARIABLES, EXPERIMENTAL_ATTENTION, WITHOUT_HIPBLASLT, reads_past_ranks


def prepare(environ: MutableMapping[str, str] | None = None, machine: Machine | None = None) -> list[str]:
    """Change `environ` as the GPU here needs it; returns what was changed and why, in words.

    The command line changes the variables of its own process, which is the default; a library call passes those of the
    processes that it starts. A value that the user has set stays, except one that hangs. Nothing is changed for a
    process that has imported torch already, or where torch is not built for ROCm.
    """
    is_too_late = environ is None and "torch" in sys.modules
    environ = os.environ if environ is None else environ
    if machine is None:
        build = read_torch_build()
        if is_too_late or build is None or not build.is_rocm:
            return []
        machine = Machine.here(environ)
    elif machine.torch is None or not machine.torch.is_rocm:
        return []
    said = []
    gfx = next(iter(Evidence(machine).gfx), "")
    if gfx in EXPERIMENTAL_ATTENTION and "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL" not in environ:
        environ["TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"] = "1"
        said.append(f"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 is set: torch holds flash attention back on {gfx}")
    unset = [name for name in WITHOUT_HIPBLASLT if name not in environ]
    if unset and reads_past_ranks(machine.torch, gfx):
        environ.update(dict.fromkeys(unset, "0"))
        told = " ".join(f"{name}=0" for name in unset)
        said.append(f"{told} is set: hipBLASLt here reads past matrices as narrow as a LoRA on {gfx}")
    for name in ALLOCATOR_VARIABLES:
        kept = [part for part in environ.get(name, "").split(",") if not _grows(part)]
        if name in environ and ",".join(kept) != environ[name]:
            said.append(f"expandable_segments is taken out of {name}: it hangs on ROCm")
            environ[name] = ",".join(kept)
            if not kept:
                del environ[name]
    return said


def _grows(part: str) -> bool:
    return re.fullmatch(r"\s*expandable_segments\s*:\s*true\s*", part, re.IGNORECASE) is not None
