"""The process that runs the checks: `python -m nybble.diagnostics.worker TABLE DEVICE`.

It prints lines of JSON: first the device, facts about torch and the list of checks, then one answer for each request
`{"check", "path"}` on stdin. Everything that libraries print goes to stderr. A fault that ends this process does not
affect the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nybble.diagnostics.checks import Check
from nybble.diagnostics.evidence import TorchFacts
from nybble.diagnostics.fingerprint import fingerprint
from nybble.diagnostics.measure import UnavailableError
from nybble.hardware import detect_device
from nybble.kernels import dispatcher


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output must not mix with the answers
    checks: Sequence[Check] = import_module(sys.argv[1]).CHECKS
    device = detect_device(sys.argv[2])
    here = device.torch_device
    hello = {
        "facts": asdict(torch_facts()),
        "device": {**asdict(device), **_gpu_facts(here)},
        "fingerprint": fingerprint(device),
        "checks": [_describe(check, here) for check in checks],
    }
    print(json.dumps(hello), file=answers, flush=True)
    table = {check.name: check for check in checks}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(table[request["check"]], here, request["path"])), file=answers, flush=True)


def answer(check: Check, device: torch.device, path: str) -> dict[str, Any]:
    """Run one check and return its outcome as plain data."""
    started = time.perf_counter()
    outcome: dict[str, Any] = {}
    try:
        computed = check.compute(device, path)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a fault in a kernel is reported here
        outcome = {"error": computed.error, "figures": dict(computed.figures)}
    except UnavailableError as error:
        outcome = {"unavailable": str(error)}
    except Exception as error:  # noqa: BLE001 - every failure is an outcome
        outcome = {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return {**outcome, "seconds": time.perf_counter() - started}


def _describe(check: Check, device: torch.device) -> dict[str, Any]:
    """A check as the asking process needs to know it; without a choice of backends it still runs once."""
    paths = dispatcher.names(check.operator, device) if check.operator else ()
    description = {name: value for name, value in vars(check).items() if name != "compute"}
    return {**description, "paths": paths or [""], "operator": check.operator if paths else ""}


def torch_facts() -> TorchFacts:
    """What torch reports about itself and its devices."""
    sees = torch.cuda.is_available()
    devices = tuple(_gpu_facts(torch.device("cuda", i)) for i in range(torch.cuda.device_count())) if sees else ()
    maps = Path("/proc/self/maps")
    loaded = (
        {line.split()[-1] for line in maps.read_text().splitlines() if "libamdhip64" in line} if maps.exists() else ()
    )
    return TorchFacts(
        version=torch.__version__,
        hip=torch.version.hip,
        rocm=getattr(torch.version, "rocm", None),
        cuda=torch.version.cuda,
        sees_gpu=sees,
        devices=devices,
        architectures=tuple(torch.cuda.get_arch_list()) if sees and torch.version.hip else (),
        hip_libraries=tuple(sorted(loaded)),
        triton=_triton_version(),
    )


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "gfx": getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else "",
        "total_bytes": total,
        "free_bytes": free,
        "threads_in_wave": getattr(properties, "warp_size", None),
        "n_cores": properties.multi_processor_count,
        "is_integrated": bool(getattr(properties, "is_integrated", False)),
    }


def _triton_version() -> str | None:
    return str(import_module("triton").__version__) if find_spec("triton") else None


if __name__ == "__main__":
    main()
