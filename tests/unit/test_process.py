"""What the command line sets for its own process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, resource
from nybble.cli.process import own_process
own_process()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(os.environ["OMP_WAIT_POLICY"], faults())
"""


def test_memory_is_used_again_and_waiting_threads_sleep() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    policy, faults = done.stdout.split()
    assert policy == "PASSIVE"
    # 20 pieces of 16 MiB are 81,920 pages; mapped anew each time every one of them would fault.
    assert int(faults) < 8192
