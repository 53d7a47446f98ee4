"""Several processes: what they learn beside one, and what a killed one costs.

    learning    losses and adapters of 1, 2 and 4 processes, ddp and fsdp
    killed      torchrun, one or two of them, starts over after a SIGKILL; the bits of the adapter

Figures are of gloo on a CPU: they show that the result is right, not how fast it is.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from bench.harness import run

STEPS = 20


def start(count: int, data: Path, out: Path, *more: str, machines: int = 1) -> list[subprocess.Popen[bytes]]:
    """`nybble train` of a real model and real rows in several processes, by a torchrun for each of the machines."""
    command = [sys.executable, "-m"]
    if count > 1:
        port = 29500 + os.getpid() % 500
        command += ["torch.distributed.run", f"--nproc-per-node={count // machines}", "--max-restarts=1"]
        command += [f"--master-port={port}"] if machines == 1 else [f"--rdzv-endpoint=localhost:{port}"]
        command += ["--rdzv-backend=c10d", f"--nnodes={machines}"] if machines > 1 else []
        command += ["-m"]
    settings = {
        "model": data / "models" / "stories260K",
        "dataset": data / "rows" / "alpaca_style_1100.json",
        "max_train_rows": 200,
        "max_length": 128,
        "chat_template": "inst",
        "per_device_train_batch_size": 4,
        "train_batch_size": 4,  # the same steps on any number of processes
        "max_steps": STEPS,
        "eval_fraction": 0,
        "learning_rate": 0.002,
        "logging_steps": 1,
        "save_steps": 5,
        "device": "cpu",
        "report_to": "none",
        "output_dir": out,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = out.with_suffix(".log").open("ab")
    words = [*command, "nybble", "train", *words, *more]
    return [
        subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT) for _machine in range(machines)
    ]


def done(launchers: Iterable[subprocess.Popen[bytes]], out: Path) -> None:
    """Wait, and stop where one failed."""
    if any(launcher.wait(600) for launcher in launchers):
        raise SystemExit("\n".join(_said(out)))


def _said(out: Path) -> list[str]:
    """The errors of a run that failed."""
    return [line for line in out.with_suffix(".log").read_text().splitlines() if line.startswith("nybble: ")]


def left(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The adapter, and the logged steps."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return load_file(out / "adapter" / "adapter_model.safetensors"), events


def learning(data: Path, grid: tuple[tuple[int, str], ...]) -> dict[str, Any]:
    """Largest differences from one process."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            alone = Path(folder) / f"{dtype}-1"
            done(start(1, data, alone, "--compute_dtype", dtype), alone)
            weights, log = left(alone)
            for count, distributed in grid:
                out = Path(folder) / f"{dtype}-{count}-{distributed}"
                done(start(count, data, out, "--compute_dtype", dtype, "--distributed", distributed), out)
                ours, ours_log = left(out)
                assert [e["tokens"] for e in ours_log] == [e["tokens"] for e in log]
                figures = {
                    "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(ours_log, log, strict=True)),
                    "adapter_difference": max(float((ours[n] - w).abs().max()) for n, w in weights.items()),
                    "adapter_largest": max(float(w.abs().max()) for w in weights.values()),
                }
                found[f"{dtype} {count} {distributed}"] = figures
                print(f"{dtype}, {count} processes, {distributed}: {figures}", flush=True)
    return found


def killed(data: Path, ways: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """One of two processes gets SIGKILL behind a checkpoint; torchrun starts over."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for distributed, machines in ways:
            name = f"{distributed}, {machines} launchers" if machines > 1 else distributed
            whole, torn = (Path(folder) / f"{distributed}-{machines}-{what}" for what in ("whole", "torn"))
            done(start(2, data, whole, "--distributed", distributed), whole)
            launchers = start(2, data, torn, "--distributed", distributed, machines=machines)
            while not any((torn / "checkpoints").glob("checkpoint-*")):
                if any(launcher.poll() is not None for launcher in launchers):
                    raise SystemExit("\n".join(_said(torn)))
                time.sleep(0.05)
            children = (child for launcher in launchers for child in psutil.Process(launcher.pid).children())
            victim = next(child for child in children if child.environ().get("RANK") == "1")
            began = time.monotonic()
            os.kill(victim.pid, signal.SIGKILL)
            done(launchers, torn)
            text = torn.with_suffix(".log").read_text()
            (expected, _), (weights, _) = left(whole), left(torn)
            same = all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
            found[name] = {"resumed": "continuing from" in text, "same_bits": same, "seconds": time.monotonic() - began}
            print(f"{name}: {found[name]}", flush=True)
    return found


def measure(asked: Namespace) -> dict[str, Any]:
    """One of the two; under --tiny the first case."""
    if asked.part == "learning":
        grid = ((2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"))
        return learning(asked.data, grid[:1] if asked.tiny else grid)
    ways = tuple(itertools.product(("ddp", "fsdp"), (1, 2)))
    return killed(asked.data, ways[:1] if asked.tiny else ways)


if __name__ == "__main__":
    run(measure, __doc__, parts=("learning", "killed"), data=True)
