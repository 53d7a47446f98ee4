"""Nybble: fine-tune large language models in 4 bits on one GPU, or on a CPU.

Every verb of the command line is a function here. Names are loaded when first used, so that `import nybble` costs
nothing; `__init__.pyi` tells their types.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Chat": "nybble.generation",
    "ask": "nybble.generation",
    "compare": "nybble.comparison",
    "demo": "nybble.pipeline",
    "doctor": "nybble.diagnostics",
    "export": "nybble.exporting",
    "merge": "nybble.exporting",
    "inspect_rows": "nybble.pipeline",
    "plan": "nybble.planning",
    "probe": "nybble.pipeline",
    "quantize": "nybble.models.four_bit_folder",
    "report": "nybble.pipeline",
    "resume_check": "nybble.interruptions",
    "train": "nybble.pipeline",
    "NybbleConfig": "nybble.models",
    "register": "nybble.models",
    "Recipe": "nybble.recipe",
    "load_recipe": "nybble.recipe",
    "NybbleError": "nybble.errors",
    "Observer": "nybble.run.record",
    "StepEvent": "nybble.run.record",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    from nybble.run.quiet import quiet_libraries

    with quiet_libraries():  # some give advice when they are imported
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
