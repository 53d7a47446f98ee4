"""The fingerprint of everything that the choice of backends depends on: device, driver, libraries and Nybble's code."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nybble.diagnostics.machine import Machine
from nybble.hardware import Device

_VARIABLES = (
    "HSA_OVERRIDE_GFX_VERSION",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "ROCBLAS_USE_HIPBLASLT",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
)
_OURS = ("kernels", "quant", "nn", "diagnostics")  # packages whose code is what was checked
_LIBRARIES = ("torch", "triton", "triton-rocm", "pytorch-triton-rocm", "transformers", "peft")


def fingerprint(device: Device) -> str:
    """A key of 32 hexadecimal digits; the backends are chosen again if it changes."""
    facts = {
        "device": [device.backend, device.name, device.total_bytes],
        "driver": Machine(Path("/"), os.environ, {}, None).driver if device.type == "cuda" else "",
        "versions": [_version(name) for name in _LIBRARIES],
        "code": _code(),
        "variables": [os.environ.get(name) for name in _VARIABLES],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@cache
def _code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    files = sorted(file for folder in _OURS for file in (package / folder).rglob("*"))
    for file in (file for file in files if file.suffix in (".py", ".so", ".pyd")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
