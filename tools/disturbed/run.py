"""What a day does to a training: each of it is done to a real `nybble train`, and what was lost is counted.

    python -m tools.disturbed.run [--steps 120] [KIND ..]

Each kind disturbs a training of the bundled 4-bit base after some steps. Where the training ends, it is resumed, and
the steps that were done and not saved are counted. In the end the adapter must have the bytes of an undisturbed one.
Checkpoints of `--save_steps` are further apart than the training is long, so that only what is saved because of the
disturbance can save the steps. The full disk needs the right to mount one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import print_table, witness
from nybble import bundled
from nybble.storage.atomic import sha256_of
from nybble.storage.checkpoints import list_checkpoints

HERE = Path(__file__).parent
DISTURBED_AT = 20  # steps
PAUSE = 15.0  # seconds in which a stopped process stands still
SLEPT = 8 * 3600  # seconds by which the clock jumps


class Run:
    """A training in a folder of its own, as a process of the command line."""

    def __init__(self, out: Path, steps: int, environment: dict[str, str] | None = None) -> None:
        self.out, self.steps = out, steps
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes]

    def start(self, *words: str, **streams: Any) -> Run:
        """Start or, with `--resume`, go on."""
        settings = {
            "model_name_or_path": bundled.base_path(),
            "dataset_name": bundled.train_rows_path(),
            "output_dir": self.out,
            "device": "cpu",
            "eval_fraction": 0,
            "n_samples": 0,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "max_steps": self.steps,
            "save_steps": 10 * self.steps,
        }
        given = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "nybble", "train", *given, *words]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=self.environment, **{**quiet, **streams})
        return self

    @property
    def step(self) -> int:
        """The last step that was logged."""
        events = self.out / "events.jsonl"
        lines = [line for line in events.read_text().splitlines() if line] if events.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def saved(self) -> int:
        """The whole steps in the newest checkpoint."""
        found = list_checkpoints([self.out / "checkpoints"])
        return int(found[0].name.removeprefix("checkpoint-").partition(".")[0]) if found else 0

    def reach(self, step: int) -> None:
        """Wait until `step` is logged."""
        while self.step < step:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.out.name} ended with {self.process.returncode} before step {step}")
            time.sleep(0.02)

    def adapter(self) -> str:
        """The hash of what was trained."""
        return sha256_of(self.out / "adapter" / "adapter_model.safetensors")


def closed_terminal(run: Run) -> None:
    """The terminal is closed, which is what the end of an ssh connection is too."""
    ours, theirs = pty.openpty()
    run.start(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
    os.close(theirs)
    while run.step < DISTURBED_AT:
        _drop(ours)
    os.close(ours)
    os.killpg(run.process.pid, signal.SIGHUP)  # as the kernel does for the session of a terminal that it controls


def _drop(terminal: int) -> None:
    time.sleep(0.02)
    try:
        os.read(terminal, 1 << 16)
    except BlockingIOError:
        return


def reader_gone(run: Run) -> None:
    """What reads the progress ends, as `| head` does."""
    run.start(stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.process.stderr
    assert run.process.stdout
    run.reach(DISTURBED_AT)
    run.process.stderr.close()
    run.process.stdout.close()


def resized_terminal(run: Run) -> None:
    """The window changes its size forty times, down to a few columns."""
    ours, theirs = pty.openpty()
    run.start(stdout=theirs, stderr=theirs, start_new_session=True)
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
    for turn in range(40):
        while run.step < DISTURBED_AT + turn // 2 and run.process.poll() is None:
            _drop(ours)
        size = struct.pack("HHHH", 3 + turn % 50, 4 + 7 * turn % 200, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        run.process.send_signal(signal.SIGWINCH)
    while run.process.poll() is None:
        _drop(ours)


def paused(run: Run) -> None:
    """SIGSTOP, and SIGCONT a while later."""
    run.start().reach(DISTURBED_AT)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE)
    run.process.send_signal(signal.SIGCONT)


def clock_jumped(run: Run) -> None:
    """The time of day jumps by eight hours, as after a laptop's sleep."""
    library, now = run.out.with_suffix(".so"), run.out.with_suffix(".now")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "jump.c"), "-ldl"], check=True)
    run.environment |= {"LD_PRELOAD": str(library), "JUMP_WHEN": str(now), "JUMP_SECONDS": str(SLEPT)}
    run.start().reach(DISTURBED_AT)
    now.touch()


def signalled(number: signal.Signals) -> Callable[[Run], None]:
    """A signal is sent."""

    def disturb(run: Run) -> None:
        run.start().reach(DISTURBED_AT)
        run.process.send_signal(number)

    return disturb


def full_disk(run: Run) -> None:
    """The disk has no byte left when the run is told to save and stop."""
    run.start().reach(DISTURBED_AT)
    with (run.out.parent / "filler").open("wb", buffering=0) as filler:
        size = 1 << 20
        while size:
            try:
                filler.write(bytes(size))
            except OSError:
                size //= 2
    run.process.send_signal(signal.SIGTERM)


KINDS: dict[str, Callable[[Run], None]] = {
    "terminal closed": closed_terminal,
    "reader of the output gone": reader_gone,
    "terminal resized 40 times": resized_terminal,
    f"stopped for {PAUSE:.0f} s": paused,
    "clock 8 h ahead": clock_jumped,
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGINT": signalled(signal.SIGINT),
    "SIGKILL": signalled(signal.SIGKILL),
    "disk full at the save": full_disk,
}
MOUNTED = "disk full at the save"
AT_ONCE = "four runs at once"


def main() -> int:
    """Disturb, resume, compare; return 1 if an adapter differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join((*KINDS, AT_ONCE))}; default: all")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    wanted = arguments.kinds or [*KINDS, AT_ONCE]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = Run(folder / "undisturbed", arguments.steps).start()
        if undisturbed.process.wait():
            raise SystemExit(f"the undisturbed training ended with {undisturbed.process.returncode}")
        expected = undisturbed.adapter()
        for number, kind in enumerate(wanted):
            print(kind, file=sys.stderr)
            runs = [Run(folder / f"run-{number}-{n}", arguments.steps) for n in range(4 if kind == AT_ONCE else 1)]
            if kind == AT_ONCE:
                for run in runs:
                    run.start()
                rows += [ended(kind, run, expected) for run in runs]
                continue
            with _small_disk(folder / f"disk-{number}") if kind == MOUNTED else _no_disk() as disk:
                if disk is not None:
                    runs = [Run(disk / "run", arguments.steps)]
                KINDS[kind](runs[0])
                rows.append(ended(kind, runs[0], expected))
    columns = ("kind", "exit_code", "steps_done", "steps_saved", "steps_lost", "identical")
    print_table(" | ".join(columns), ([row[name] for name in columns] for row in rows))
    print(json.dumps({**witness("disturbed"), "steps": arguments.steps, "rows": rows}))
    return int(not all(row["identical"] for row in rows))


def ended(kind: str, run: Run, expected: str) -> dict[str, Any]:
    """The end of a run, what was lost, and whether it is the undisturbed one after what is left of it."""
    code = run.process.wait()
    done, saved = run.step, run.steps if code == 0 else run.saved
    if code != 0:
        (run.out.parent / "filler").unlink(missing_ok=True)
        resumed = run.start("--resume" if saved else "--auto-resume").process.wait()
        if resumed != 0:
            raise SystemExit(f"{kind}: resuming ended with {resumed}")
    found = {"exit_code": code, "steps_done": done, "steps_saved": saved, "steps_lost": done - saved}
    return {"kind": kind, **found, "identical": run.adapter() == expected}


@contextmanager
def _small_disk(at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def _no_disk() -> Iterator[None]:
    yield None


if __name__ == "__main__":
    sys.exit(main())
