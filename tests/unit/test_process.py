"""What the command line sets for its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from nybble.cli.process import own_process
from nybble.cli.streams import unbreakable


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


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[bytes] = []

    def read_late() -> None:
        time.sleep(0.1)
        while part := os.read(reader, 1 << 16):
            got.append(part)

    listener = threading.Thread(target=read_late)
    listener.start()
    with os.fdopen(writer, "w") as stream:
        print("x" * 300_000, file=unbreakable(stream), flush=True)
    listener.join()
    os.close(reader)
    assert b"".join(got) == b"x" * 300_000 + b"\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_result_that_a_full_disk_refuses_is_no_silent_loss() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        print("for people", file=unbreakable(full, drops_all=True), flush=True)
        with pytest.raises(OSError, match="No space left"):
            print("a result", file=unbreakable(full), flush=True)
