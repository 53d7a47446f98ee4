"""Several processes: what they learn beside one, what they hold, what a killed one costs, what the planner predicts.

    python bench/distributed.py --data DATA learning     losses and adapters of 1, 2 and 4 processes, ddp and fsdp
    python bench/distributed.py --data DATA killed       torchrun begins anew after SIGKILL; the bits of the result
    python bench/distributed.py held                     bytes that each of 2 processes holds of a 7B-shaped model
    python bench/distributed.py live                     the most that is alive in each while it trains, beside the plan
    python bench/distributed.py table                    the planner's prediction for 70B (no measurement)

DATA holds models/ and rows/. Figures are of gloo on a CPU: they show that the result is right, not how fast it is.
Prints a line per figure and one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
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
from nybble.models import held_bytes, shard
from nybble.nn import Linear4bit
from nybble.planning import PROFILES, find_config, make_plan, plan_in_shards, profile_of, share_of
from nybble.planning.processes import Sizes, sent_bytes
from nybble.planning.step import build, config_with, fill
from nybble.processes import joined
from nybble.recipe import load_recipe
from nybble.runs import RunDirectory, Silent
from nybble.sharded import for_shards
from nybble.training import Setup, software_versions, train_model
from nybble.training.depth import decoder_layers

_STEPS = 20
_LENGTH = 256
_LAYERS = 8  # of a 7B-shaped model's 32: what two processes hold of it fits this machine
_CARDS = {24: "rtx4090", 48: "rtx4090", 80: "h200", 192: "mi300x"}  # GB -> whose rates are taken


def start(count: int, data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`nybble train` of a real model and real rows in so many processes, by torchrun."""
    command = [sys.executable, "-m"]
    if count > 1:
        port = 29500 + os.getpid() % 500
        command += ["torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}", "--max-restarts=1"]
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
    log = out.with_suffix(".log").open("wb")
    return subprocess.Popen(
        [*command, "nybble", "train", *words, *more], env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def done(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait, and stop where it failed."""
    if process.wait(600):
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
        for distributed in ("ddp", "fsdp"):
            whole, torn = Path(folder) / f"{distributed}-whole", Path(folder) / f"{distributed}-torn"
            done(start(2, data, whole, "--distributed", distributed), whole)
            process = start(2, data, torn, "--distributed", distributed)
            while not any((torn / "checkpoints").glob("checkpoint-*")):
                if process.poll() is not None:
                    raise SystemExit("\n".join(_said(torn)))
                time.sleep(0.05)
            children = psutil.Process(process.pid).children()
            victim = next(child for child in children if child.environ().get("RANK") == "1")
            os.kill(victim.pid, signal.SIGKILL)
            done(process, torn)
            text = torn.with_suffix(".log").read_text()
            (expected, _), (weights, _) = left(whole), left(torn)
            same = all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
            found[distributed] = {"resumed": "going on from" in text, "same_bits": same}
            print(f"{distributed}: {found[distributed]}", flush=True)
    return found


def in_two_processes(what: str) -> dict[str, Any]:
    """This program, started again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__, what]
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


def live() -> dict[str, Any]:
    """Started by itself in two processes: three steps of Llama-2-7B's shape with fewer layers, in shards."""
    if "RANK" not in os.environ:
        return in_two_processes("live")
    found: dict[str, Any] = {}
    with joined(True) as processes:
        for depth in ("never", "always"):
            settings = {"model": "llama-2-7b", "distributed": "fsdp", "per_device_train_batch_size": 2, "device": "cpu"}
            settings |= {"max_length": _LENGTH, "gradient_checkpointing": depth, "report_to": "none"}
            recipe = for_shards(load_recipe(None, settings))
            config = config_with(find_config(recipe.model)[0], _LAYERS // 2)
            share, device = share_of(recipe, 2), detect_device("cpu")
            plan = plan_in_shards(share, config, profile_of(device), None, 2)
            model = build(config, recipe, torch.bfloat16)
            if processes.is_main:
                fill(model)
            shard(model, decoder_layers(model), processes, device.torch_device)
            ids = [1] * _LENGTH
            groups = Groups([Example(ids, ids, 1, 1, 0, (2,), 0, 0, False) for _ in range(6)])
            with tempfile.TemporaryDirectory() as folder, Storages([*model.parameters(), *model.buffers()]) as seen:
                where = (RunDirectory(Path(folder)), device, torch.bfloat16, Silent(), lambda _: 0.0, 0, 3)
                setup = Setup(*where, plan.step_memory, processes=processes)
                train_model(model, None, groups, share.training.model_copy(update={"output_dir": folder}), setup)
            planned = max(phase.live_bytes for phase in plan.phases if phase.name in ("first step", "steady step"))
            measured = processes.gather(seen.most)
            found[depth] = {"measured_bytes": measured, "planned_bytes": planned, "error": planned / max(measured) - 1}
            del model
    return found


def held() -> dict[str, Any]:
    """Started by itself in two processes: a model of Llama-2-7B's shape with fewer layers, of zeros."""
    if "RANK" not in os.environ:
        return in_two_processes("held")
    recipe = load_recipe(None, {"model_name_or_path": "llama-2-7b"})
    config = config_with(find_config(recipe.model)[0], _LAYERS)
    with joined(True) as processes:
        model = build(config, recipe, torch.bfloat16)
        packed = sum(m.packed.n_bytes for m in model.modules() if isinstance(m, Linear4bit))
        if processes.is_main:
            fill(model)
        shard(model, decoder_layers(model), processes, detect_device("cpu").torch_device)
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
        "layers": _LAYERS,
        "packed_bytes_whole": packed,
        "processes": figures,
        "planned_bytes": sizes.whole // 2,
    }


def table() -> dict[str, Any]:
    """70B at 8 rows of 512 tokens a step; the memory that each card would take, and a step's time."""
    found: dict[str, Any] = {}
    recipe = load_recipe(
        None,
        {"model": "llama-2-70b", "distributed": "fsdp", "per_device_train_batch_size": 8, "max_length": 512},
    )
    config = find_config(recipe.model)[0]
    sizes = Sizes.of(config, recipe, torch.bfloat16)
    for size, rates in _CARDS.items():
        profile = replace(PROFILES[rates], memory_bytes=int(size * 1e9))
        for n in (1, 2, 4, 8):
            share = share_of(recipe, n)
            made = make_plan(share, config, profile) if n == 1 else plan_in_shards(share, config, profile, None, n)
            sent = 0 if n == 1 else sent_bytes(sizes, n, share.training.per_device_train_batch_size // made.micro_batch)
            found[f"{n} x {size} GB"] = {
                "fits": made.fits,
                "peak_bytes": made.peak_bytes,
                "recompute_layers": made.recompute_layers,
                "micro_batch": made.micro_batch,
                "sent_bytes_per_step": sent,
                "compute_seconds": made.step_seconds,
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
    figures |= {"held": held, "live": live, "table": table}
    result = figures[given.what]()
    device = "none: a prediction" if given.what == "table" else detect_device("cpu").name
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"what": given.what, "device": device, "versions": software_versions(), "figures": result}))


if __name__ == "__main__":
    main()
