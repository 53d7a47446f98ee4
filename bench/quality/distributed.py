"""Several processes: what they learn beside one, what they hold, what a killed one costs, what the planner predicts.

    python -m bench.quality.distributed [--data DATA] WHAT

    --data DATA learning  losses and adapters of 1, 2 and 4 processes, ddp and fsdp
    --data DATA killed    torchrun, one or two, begins anew after SIGKILL; the bits
    held                  bytes that each of 2 processes holds of a 7B-shaped model
    live                  the most that is alive in each while it trains, beside the plan
    table                 the planner's prediction for 70B (no measurement)

DATA holds models/ and rows/. Figures are of gloo on a CPU: they show that the result is right, not how fast it is.
Prints a line per figure and one JSON object last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nybble.data import Example, Groups
from nybble.hardware import detect_device
from nybble.models import config_with_layers, find_model, held_bytes, materialize, meta_model, shard
from nybble.nn import Linear4bit
from nybble.nn.scratch import scratch
from nybble.planning import PROFILES, find_config, make_plan, plan_shared, profile_of, shards_among, share_of
from nybble.planning.sharded_memory import Sizes
from nybble.recipe import load_recipe
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.record import Silent
from nybble.run.rendezvous import joined
from nybble.sharded import for_shards, load_in_shards
from nybble.training import Setup, software_versions, train_model

_STEPS = 20
_LENGTH = 256
_LAYERS = 4  # of a 7B-shaped model's 32 that are trained in shards
_CARDS = {24: "rtx4090", 48: "rtx4090", 80: "h200", 192: "mi300x"}  # GB -> whose rates are taken


def start(count: int, data: Path, out: Path, *more: str, machines: int = 1) -> list[subprocess.Popen[bytes]]:
    """`nybble train` of a real model and real rows in so many processes, by a torchrun for each of the machines."""
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
        "max_steps": _STEPS,
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


def learning(data: Path) -> dict[str, Any]:
    """Largest differences from one process."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            alone = Path(folder) / f"{dtype}-1"
            done(start(1, data, alone, "--compute_dtype", dtype), alone)
            weights, log = left(alone)
            for count, distributed in ((2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")):
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


def killed(data: Path) -> dict[str, Any]:
    """One of two processes gets SIGKILL behind a checkpoint; torchrun begins anew."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for distributed, machines in itertools.product(("ddp", "fsdp"), (1, 2)):
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
            found[name] = {"resumed": "going on from" in text, "same_bits": same, "seconds": time.monotonic() - began}
            print(f"{name}: {found[name]}", flush=True)
    return found


def in_processes(count: int, *words: str) -> dict[str, Any]:
    """This program, started again in so many."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", __file__, *words]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return dict(json.loads(out.stdout.strip().splitlines()[-1])["figures"])


class Storages(TorchDispatchMode):
    """The most bytes of tensors alive. Asks all storages at each operator, for FSDP2 empties and refills its own."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._see(tensors)

    def _see(self, values: Any) -> None:
        for value in tree_iter(values):
            if isinstance(value, torch.Tensor):
                storage = (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see((args, kwargs, result))
        alive = {key: storage for key, reference in self._seen.items() if (storage := reference()) is not None}
        self._seen = {key: self._seen[key] for key in alive}
        self.most = max(self.most, sum(storage.nbytes() for storage in alive.values()))
        return result


@dataclass(frozen=True)
class Trained:
    """Three steps in shards: of a model in a folder, or of Llama-2-7B's shape with so many layers, of zeros."""

    model: str
    depth: str  # gradient_checkpointing
    n_layers: int = 0
    tied: bool = False
    rows: int = 1  # of each process
    length: int = 256
    shards: int | None = None  # of a copy; None: all processes share one

    @classmethod
    def all(cls, data: Path | None, count: int) -> Iterator[Trained]:
        """The grid, with the folders of `data` where it is given."""
        for folder in sorted((data / "models").iterdir()) if data else ():
            yield from (cls(str(folder), depth, rows=4, length=128) for depth in ("never", "always"))
        shape = cls("llama-2-7b", "never", _LAYERS)
        groups = [replace(shape, shards=2)] if count > 2 else []
        for case in (shape, replace(shape, tied=True), replace(shape, length=1024), *groups):
            yield from (replace(case, depth=depth) for depth in ("never", "always"))

    def run(self, processes: Processes) -> dict[str, Any]:
        """What was alive at the highest moment in each process, and what was planned."""
        settings = {"model": self.model, "per_device_train_batch_size": processes.count * self.rows, "device": "cpu"}
        settings |= {"max_length": self.length, "gradient_checkpointing": self.depth, "report_to": "none"}
        settings |= {"distributed": "fsdp", "fsdp_shards": self.shards}
        recipe = for_shards(load_recipe(None, settings))
        config, name = find_config(recipe.model)
        device, share = detect_device("cpu"), share_of(recipe, processes.count)
        if self.n_layers:
            config = config_with_layers(config, self.n_layers)
            config.tie_word_embeddings = self.tied
        ids = [1] * self.length
        n_shards = shards_among(recipe.training, processes.count)
        plan = make_plan(share, config, profile_of(device), n_shards=n_shards)
        if self.n_layers:
            model = meta_model(config, recipe, torch.bfloat16)
            if processes.is_main:
                materialize(model)
            shard(model, processes, device.torch_device, n_shards=n_shards)
        else:
            model, _, _ = load_in_shards(find_model(recipe.model), recipe, device, name, processes)
        groups = Groups([Example(ids, ids, 1, 1, 0, (2,), 0, 0, False) for _ in range(3 * self.rows * processes.count)])
        scratch.clear()
        with tempfile.TemporaryDirectory() as folder, Storages([*model.parameters(), *model.buffers()]) as seen:
            where = (RunDirectory(Path(folder)), device, torch.bfloat16, Silent(), lambda _: 0.0, 0, 3)
            setup = Setup(*where, plan.step_memory, processes=processes)
            train_model(model, None, groups, share.training.model_copy(update={"output_dir": folder}), setup)
        phase = max((p for p in plan.phases if p.name in ("first step", "steady step")), key=lambda p: p.live_bytes)
        measured = processes.gather(seen.most)
        case = {**asdict(self), "model": Path(self.model).name, "processes": processes.count}
        return {
            **case,
            "measured_bytes": measured,
            "planned_bytes": phase.live_bytes,
            "parts": phase.parts,
            "error": phase.live_bytes / max(measured) - 1,
        }


def live(data: Path | None) -> dict[str, Any]:
    """Started by itself in two and in four processes: trainings in shards."""
    if "RANK" not in os.environ:
        words = ["live", *(["--data", str(data)] if data else [])]
        return {f"{count} processes": in_processes(count, *words)["cases"] for count in (2, 4)}
    with joined(True) as processes:
        return {"cases": [case.run(processes) for case in Trained.all(data, processes.count)]}


def held() -> dict[str, Any]:
    """Started by itself in two processes: a model of Llama-2-7B's shape, of zeros."""
    if "RANK" not in os.environ:
        return in_processes(2, "held")
    recipe = load_recipe(None, {"model_name_or_path": "llama-2-7b"})
    config, _ = find_config(recipe.model)
    with joined(True) as processes:
        model = meta_model(config, recipe, torch.bfloat16)
        packed = sum(m.packed.n_bytes for m in model.modules() if isinstance(m, Linear4bit))
        if processes.is_main:
            materialize(model)
        shard(model, processes, detect_device("cpu").torch_device)
        ours = [m for m in model.modules() if isinstance(m, Linear4bit)]
        mine = sum(t.to_local().numel() for m in ours for t in (m.weight, m.absmax))
        figures = processes.gather(
            {
                "held_bytes": held_bytes(model),
                "packed_bytes": mine,
                "resident_bytes": psutil.Process().memory_info().rss,
            }
        )
        sizes = Sizes.of(config, recipe, torch.bfloat16)
    return {
        "layers": config.num_hidden_layers,
        "packed_bytes_whole": packed,
        "processes": figures,
        "planned_bytes": sizes.whole // 2,
    }


def table() -> dict[str, Any]:
    """70B at 8 rows of 512 tokens a step: what each card would take and send, and how fast a step would be."""
    found: dict[str, Any] = {}
    settings = {"model": "llama-2-70b", "distributed": "fsdp", "per_device_train_batch_size": 8, "max_length": 512}
    recipe = load_recipe(None, settings)
    config = find_config(recipe.model)[0]
    for size, rates in _CARDS.items():
        profile = replace(PROFILES[rates], memory_bytes=int(size * 1e9))
        one = plan_shared(recipe, config, profile, 1)
        for n in (1, 2, 4, 8):
            made = plan_shared(recipe, config, profile, n)
            speed = one.step_seconds / made.step_seconds / n if one.plan.fits else None
            found[f"{n} x {size} GB"] = {
                "fits": made.plan.fits,
                "peak_bytes": made.plan.peak_bytes,
                "recompute_layers": made.plan.recompute_layers,
                "micro_batch": made.plan.micro_batch,
                "sent_bytes_per_step": made.sent_bytes_per_step,
                "link_bytes_per_second": made.link_bytes_per_second,
                "compute_seconds": made.plan.step_seconds,
                "step_seconds": made.step_seconds,
                "of_n_times_one": speed,
                "rates_of": rates,
            }
            print(f"{n} x {size} GB: {found[f'{n} x {size} GB']}", flush=True)
    return found


def main() -> None:
    """Measure one of the five and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with models/ and rows/")
    parser.add_argument("what", choices=["learning", "killed", "held", "live", "table"])
    given = parser.parse_args()
    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "learning": lambda: learning(given.data),
        "killed": lambda: killed(given.data),
    }
    figures |= {"held": held, "live": lambda: live(given.data), "table": table}
    result = figures[given.what]()
    device = "none: a prediction" if given.what == "table" else detect_device("cpu").name
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"what": given.what, "device": device, "versions": software_versions(), "figures": result}))


if __name__ == "__main__":
    main()
