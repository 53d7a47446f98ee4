"""Trainings of a tiny model that can be stopped at any micro-batch, and all that they leave."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nybble.data import Groups, pack_rows, prepare_rows
from nybble.errors import StoppedError
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, load_tokenizer
from nybble.recipe import Recipe, load_recipe
from nybble.run.directory import RunDirectory
from nybble.run.record import Silent
from nybble.storage.atomic import sha256_of
from nybble.storage.checkpoints import list_checkpoints, verify
from nybble.training import HeldOut, checkpointing, find_checkpoint, folders_of, identify, train_model
from nybble.training.stopping import Stops

# 14 rows by 2 x 3: three steps an epoch, the last of them of one micro-batch; seven steps end within the third epoch.
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 7,
    "logging_steps": 2,
    "save_steps": 100,
    "learning_rate": 1e-2,
    "eval_fraction": 0,
    "report_to": "none",
    "lora_dropout": 0.1,
}


@dataclass
class World:
    """What can be trained again and again."""

    recipe: Recipe
    tokenizer: Any
    prepared: Any
    base: Path

    said: list[str] = field(default_factory=list)  # to who watches

    def note(self, text: str) -> None:
        self.said.append(text)

    model: Any = None  # the latest that was trained

    def train(
        self, out: Path, *, resume: bool = False, force: bool = False, held_out: bool = False, **changes: Any
    ) -> Any:
        recipe = self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=changes)})
        section, device = recipe.training, detect_device("cpu")
        random.seed(len(str(out)) + resume)  # what was drawn before a training must not count
        np.random.seed(len(str(out)) + resume)
        model, loaded = load_model(find_model(recipe.model), recipe.method, recipe.model, recipe.quantization, device)
        torch.manual_seed(3)
        if recipe.method != "full":
            model = attach(model, recipe.lora, "base")
        parents = folders_of(out, section)
        found = find_checkpoint(parents, self.note) if resume else None
        identity = partial(identify, recipe, self.base, self.tokenizer, self.prepared, sha256_of)
        saving = checkpointing(recipe, parents, identity, found, force, self.note)
        lengths = self.prepared.train.column("length").tolist()
        packs = pack_rows(lengths, recipe.data.max_length) if recipe.data.packing else None
        run = RunDirectory(out)
        run.create()
        if resume:
            torch.manual_seed(99)
        else:
            torch.manual_seed(4)
        self.model = model
        rows = HeldOut([self.prepared.train[0]], recipe.evaluation)
        return train_model(
            model,
            self.tokenizer,
            Groups(self.prepared.train, packs),
            section,
            run=run,
            device=device,
            compute_dtype=getattr(torch, loaded.compute_dtype),
            max_steps=section.max_steps,
            observer=Watch(self.note),
            checkpointing=saving,
            held_out=rows if held_out else None,
            deadline=time.monotonic() + section.max_seconds if section.max_seconds else None,
        )


class Watch(Silent):
    """Hands notes on."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note  # type: ignore[method-assign]


@pytest.fixture
def world(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., World]:
    rows = tmp_path / "rows.jsonl"
    texts = [f"<s>[INST] What is {word}? [/INST] It is {word * 2}. </s>" for word in "abcdefghijklmn"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(**changes: Any) -> World:
        base = tiny_llama()
        recipe = load_recipe(None, {**COMMON, **changes, "model_name_or_path": str(base), "dataset_name": str(rows)})
        tokenizer = load_tokenizer(find_model(recipe.model), recipe.model)
        prepared = prepare_rows(recipe.data, recipe.evaluation, tokenizer, recipe.training.seed)
        return World(recipe, tokenizer, prepared, base)

    return make


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`stop_after(n)`: as if a signal came in the n-th micro-batch from now."""

    def arm(n_micro_batches: int | None) -> None:
        seen = 0

        def look(self: Stops) -> None:
            nonlocal seen
            seen += 1
            if seen == n_micro_batches:
                self.reason = "SIGTERM"

        monkeypatch.setattr(Stops, "_look", look)

    return arm


@pytest.fixture
def everything() -> Callable[[Path], dict[str, Any]]:
    """All that a training leaves, but for times."""
    return _everything


@pytest.fixture
def assert_same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Of two trainings, by what they left."""
    return _assert_same


@pytest.fixture
def stopped(stop_after: Callable[[int | None], None]) -> Callable[..., Path]:
    """`stopped(world, out, at)` -> the folder of a training that was stopped in its micro-batch `at`."""

    def call(world: World, out: Path, at: int = 5) -> Path:
        stop_after(at)
        with pytest.raises(StoppedError):
            world.train(out)
        stop_after(None)
        return out

    return call


def _everything(out: Path) -> dict[str, Any]:
    """All that a training leaves, but for times."""
    newest = list_checkpoints([out / "checkpoints"])[0]
    verify(newest)
    found: dict[str, Any] = {"name": newest.name}
    for file in sorted(newest.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    state = json.loads((newest / "state.json").read_text())
    del state["counters"]["seconds"], state["recipe"], state["versions"]
    found["state"] = state
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    found["events"] = [
        {key: event[key] for key in ("step", "loss", "grad_norm", "learning_rate", "tokens")} for event in events
    ]
    return found


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, f"{name}: {ours[name]} and not {value}"
