"""What the command line sets for its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nybble.cli.process import own_process


def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    own_process()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    own_process()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


HOLES = """
import sys
from pathlib import Path
from nybble.cli.process import own_process

if sys.argv[1] == "own":
    own_process()
del (big := [bytearray(16 << 20)])[:]  # glibc's threshold rises to its size
blocks = [bytearray(4 << 20) for _ in range(50)]
del blocks[:-1]  # what is left keeps the heap from shrinking
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096 >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_freed_blocks_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def resident_megabytes(which: str) -> int:
        return int(subprocess.run([sys.executable, "-c", HOLES, which], check=True, capture_output=True).stdout)

    assert resident_megabytes("by default") > 200
    assert resident_megabytes("own") < 100
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    assert resident_megabytes("own") > 200, "a user's own choice stays"
