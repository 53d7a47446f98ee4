"""All cases on one target, in a process of its own: python -m ptx.sweep sm_90 [TYPE ..]

The last line is a JSON object: the version of Triton, the number of cases, the largest error of each kernel and type,
and what was wrong. It is how the tests run a Triton other than the one that is installed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import triton

from ptx.cases import TYPES, every_case
from ptx.launches import Executor, launching


def sweep(target: str, kinds: list[str], **how: bool) -> dict[str, Any]:
    """Execute all cases of these types."""
    began, done = time.monotonic(), 0
    largest: dict[str, float] = {}
    wrong: list[str] = []
    with launching(target, Executor(**how)):
        for kind in kinds:
            for case in every_case(kind):
                done += 1
                name = f"{case.kernel} {kind}"
                try:
                    error = case.error()
                except Exception as problem:  # noqa: BLE001 - whatever a case meets is what this reports
                    wrong.append(f"{name} {case.about}: {type(problem).__name__}: {str(problem)[:200]}")
                    continue
                largest[name] = max(largest.get(name, 0.0), error)
                if case.is_wrong(error):
                    wrong.append(f"{name} {case.about}: off by {error:.3g}")
    seconds = round(time.monotonic() - began, 1)
    about = {"triton": triton.__version__, "target": target, "cases": done, "seconds": seconds}
    return {**about, "largest": largest, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(sweep(sys.argv[1], sys.argv[2:] or list(TYPES))) + "\n")
