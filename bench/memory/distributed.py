"""Several processes in shards: what each holds, what is alive while it trains, and what the planner predicts.

    held                  bytes that each of 2 processes holds of a 7B-shaped model
    live [--data DATA]    the most that is alive in each of 2 and 4 processes while it trains, beside the plan
    table                 the planner's prediction for 70B, which is no measurement

Figures are of gloo on a CPU.
"""

from __future__ import annotations

import tempfile
import weakref
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench.harness import Option, fresh, run
from bench.models import small_models
from nybble.data import Example, Groups
from nybble.hardware import detect_device
from nybble.models import (
    find_model,
    for_shards,
    held_bytes,
    load_in_shards,
    materialize,
    meta_model,
    shard,
    shards_among,
)
from nybble.nn import Linear4bit
from nybble.nn.workspace import workspace
from nybble.planning import PROFILES, find_config, make_plan, plan_shared, profile_of, share_of
from nybble.planning.sharded_memory import Sizes
from nybble.recipe import load_recipe
from nybble.run.directory import RunDirectory
from nybble.run.processes import Processes
from nybble.run.rendezvous import joined
from nybble.training import train_model

MODULE = "bench.memory.distributed"
SHARDED_LAYERS = 4  # of a 7B-shaped model's 32 that are trained in shards
CARDS = {24: "rtx4090", 48: "rtx4090", 80: "h200", 192: "mi300x"}  # GB -> whose rates are taken


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
    """Three steps in shards: of a model in a folder, or of Llama-2-7B's shape with `n_layers` layers of zeros."""

    model: str
    depth: str  # gradient_checkpointing
    n_layers: int = 0
    tied: bool = False
    rows: int = 1  # of each process
    length: int = 256
    shards: int | None = None  # of a copy; None: all processes share one

    @classmethod
    def all(cls, models: list[str], count: int) -> Iterator[Trained]:
        """The grid, with the folders of `models`."""
        for folder in models:
            yield from (cls(folder, depth, rows=4, length=128) for depth in ("never", "always"))
        shape = cls("llama-2-7b", "never", SHARDED_LAYERS)
        groups = [replace(shape, shards=2)] if count > 2 else []
        for case in (shape, replace(shape, tied=True), replace(shape, length=1024), *groups):
            yield from (replace(case, depth=depth) for depth in ("never", "always"))

    def run(self, processes: Processes) -> dict[str, Any]:
        """What was alive at the highest moment in each process, and what was planned."""
        settings = {"model": self.model, "per_device_train_batch_size": self.rows, "device": "cpu"}
        settings |= {"max_length": self.length, "gradient_checkpointing": self.depth, "report_to": "none"}
        settings |= {"distributed": "fsdp", "fsdp_shards": self.shards}
        recipe = for_shards(load_recipe(None, settings))
        config, name = find_config(recipe.model)
        device, share = detect_device("cpu"), share_of(recipe, processes.count)
        if self.n_layers:
            config.num_hidden_layers = self.n_layers
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
        workspace.clear()
        with tempfile.TemporaryDirectory() as folder, Storages([*model.parameters(), *model.buffers()]) as seen:
            train_model(
                model,
                None,
                groups,
                share.training.model_copy(update={"output_dir": folder}),
                run=RunDirectory(Path(folder)),
                device=device,
                compute_dtype=torch.bfloat16,
                max_steps=3,
                step_memory=plan.step_memory,
                processes=processes,
            )
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


def live_here(models: list[str], first: int) -> list[dict[str, Any]]:
    """In each of several processes: trainings in shards, the first cases of the grid."""
    with joined(True) as processes:
        return [case.run(processes) for case in list(Trained.all(models, processes.count))[:first]]


def held_here(n_layers: int) -> dict[str, Any]:
    """In each of two processes: a model of Llama-2-7B's shape, of zeros."""
    recipe = load_recipe(None, {"model_name_or_path": "llama-2-7b"})
    config = find_config(recipe.model)[0]
    config.num_hidden_layers = n_layers
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
        "planned_bytes": sizes.all_bytes // 2,
    }


def table(cards: dict[int, str], counts: tuple[int, ...]) -> dict[str, Any]:
    """70B at 8 rows of 512 tokens a step: what each card would take and send, and how fast a step would be."""
    found: dict[str, Any] = {}
    settings = {"model": "llama-2-70b", "distributed": "fsdp", "max_length": 512}
    settings |= {"per_device_train_batch_size": 8, "train_batch_size": 8}
    recipe = load_recipe(None, settings)
    config = find_config(recipe.model)[0]
    for size, rates in cards.items():
        profile = replace(PROFILES[rates], memory_bytes=int(size * 1e9))
        one = plan_shared(recipe, config, profile, 1)
        for n in counts:
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


def measure(asked: Namespace) -> dict[str, Any]:
    """One of the three."""
    if asked.part == "held":
        return dict(fresh(MODULE, "held_here", asked.layers, processes=2))
    if asked.part == "live":
        counts = (2,) if asked.tiny else (2, 4)
        grid = (small_models(asked.data), asked.cases)
        return {f"{count} processes": fresh(MODULE, "live_here", *grid, processes=count) for count in counts}
    return table({48: CARDS[48]}, (1,)) if asked.tiny else table(CARDS, (1, 2, 4, 8))


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("layers", 32, tiny=2, help="held: of the 7B-shaped model"),
        Option("cases", 1000, tiny=1, help="live: the first N cases"),
        parts=("held", "live", "table"),
        data=None,
    )
