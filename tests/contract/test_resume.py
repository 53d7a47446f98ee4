"""A training that is stopped anywhere and resumed ends in the very bits of the undisturbed one."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.checkpoints import list_checkpoints, verify
from nybble.data import Groups, pack_rows, prepare_rows
from nybble.errors import InputError, StoppedError
from nybble.files import sha256_of
from nybble.hardware import detect_device
from nybble.models import attach, find_model, load_model, load_tokenizer
from nybble.recipe import Recipe, load_recipe
from nybble.runs import RunDirectory, Silent
from nybble.training import Setup, checkpointing, find_checkpoint, folders_of, identify, train_model
from nybble.training.callbacks import Stops

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
MICRO_BATCHES = 3 * 7 - 2 * 2  # of the whole training
VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {},
    "lora": {"method": "lora", "compute_dtype": "float32", "lr_scheduler_type": "cosine"},
    "full": {"method": "full", "optim": "sgd"},
    "packing": {"packing": True, "max_length": 96},
    "dora": {"use_dora": True, "method": "lora", "lora_dropout": 0.3},  # dropout by torch's generator
    "adafactor": {"optim": "adafactor", "method": "lora"},
    "rmsprop": {"optim": "rmsprop", "max_grad_norm": 0},
    "adamw_8bit": {"optim": "adamw_8bit", "method": "full"},
}


@dataclass
class World:
    """What can be trained again and again."""

    recipe: Recipe
    tokenizer: Any
    identity: Callable[[], Any]
    prepared: Any
    base: Path

    def train(self, out: Path, *, resume: bool = False, force: bool = False, **changes: Any) -> Any:
        recipe = self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=changes)})
        section, device = recipe.training, detect_device("cpu")
        random.seed(len(str(out)) + resume)  # what was drawn before a training must not count
        np.random.seed(len(str(out)) + resume)
        model, loaded = load_model(find_model(recipe.model), recipe.method, recipe.model, recipe.quantization, device)
        torch.manual_seed(3)
        if recipe.method != "full":
            model = attach(model, recipe.lora, "base")
        parents = folders_of(out, section)
        found = find_checkpoint(parents, lambda _: None) if resume else None
        identity = partial(identify, recipe, self.base, self.tokenizer, self.prepared, sha256_of)
        saving = checkpointing(recipe, parents, identity, found, force, lambda _: None)
        lengths = self.prepared.train.column("length").tolist()
        packs = pack_rows(lengths, recipe.data.max_length) if recipe.data.packing else None
        run = RunDirectory(out)
        run.create()
        setup = Setup(
            run,
            device,
            getattr(torch, loaded.compute_dtype),
            Silent(),
            lambda _: 0.0,
            0,
            section.max_steps,
            checkpointing=saving,
        )
        if resume:
            torch.manual_seed(99)
        else:
            torch.manual_seed(4)
        return train_model(model, self.tokenizer, Groups(self.prepared.train, packs), section, setup)


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
        return World(recipe, tokenizer, lambda: None, prepared, base)

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


def everything(out: Path) -> dict[str, Any]:
    """All that a training leaves, but for times."""
    newest = list_checkpoints([out / "checkpoints"])[0]
    verify(newest)
    found: dict[str, Any] = {"name": newest.name}
    for file in sorted(newest.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    state = json.loads((newest / "state.json").read_text())
    del state["counters"]["logbook"]["seconds"], state["recipe"]
    found["state"] = state
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    found["events"] = [
        {key: event[key] for key in ("step", "loss", "grad_norm", "learning_rate", "tokens")} for event in events
    ]
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, f"{name}: {ours[name]} and not {value}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_from_anywhere_is_the_undisturbed_training(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path, variant: str
) -> None:
    made = world(**VARIANTS[variant])
    stop_after(None)
    straight = made.train(tmp_path / "straight")
    expected = everything(tmp_path / "straight")
    assert expected["name"] == "checkpoint-7"
    for at in range(1, MICRO_BATCHES) if variant == "qlora" else (2, 7):  # within a step; where an epoch ends
        out = tmp_path / f"stopped-{at}"
        stop_after(at)
        with pytest.raises(StoppedError, match="saved; go on with --resume"):
            made.train(out)
        stop_after(None)
        resumed = made.train(out, resume=True)
        assert_same(everything(out), expected)
        assert resumed.train_loss == straight.train_loss


def test_a_training_may_be_stopped_at_every_micro_batch(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    made = world(use_dora=True, method="lora")
    stop_after(None)
    made.train(tmp_path / "straight")
    stopped = 0
    for _ in range(MICRO_BATCHES):
        stop_after(1)
        try:
            made.train(tmp_path / "out", resume=stopped > 0)
        except StoppedError:
            stopped += 1
    assert stopped >= MICRO_BATCHES - 4  # the micro-batches that are passed over count here, too
    stop_after(None)
    made.train(tmp_path / "out", resume=True)
    assert_same(everything(tmp_path / "out"), everything(tmp_path / "straight"))


def notes_of(world: World, out: Path, **changes: Any) -> list[str]:
    """What a resumed training says first."""
    said: list[str] = []
    parents = folders_of(out, world.recipe.training)
    identity = partial(identify, world.recipe, world.base, world.tokenizer, world.prepared, sha256_of)
    checkpointing(world.recipe, parents, identity, find_checkpoint(parents, said.append), False, said.append)
    return said


def stopped(world: World, out: Path, stop_after: Callable[[int | None], None], at: int = 5) -> Path:
    stop_after(at)
    with pytest.raises(StoppedError):
        world.train(out)
    stop_after(None)
    return out


def test_a_damaged_checkpoint_is_passed_over_and_named(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    made = world(save_steps=1)
    made.train(tmp_path / "straight")
    out = stopped(made, tmp_path / "out", stop_after, at=8)
    assert [path.name for path in list_checkpoints([out / "checkpoints"])] == ["checkpoint-3.1", "checkpoint-3"]
    newest = out / "checkpoints" / "checkpoint-3.1" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    said = notes_of(made, out)
    assert "checkpoint-3.1 is passed over: state.safetensors is not what was written (SHA-256)" in said
    assert said[-1].endswith("checkpoint-3")
    made.train(out, resume=True)
    assert_same(everything(out), everything(tmp_path / "straight"))


def test_only_damaged_checkpoints_are_no_beginning(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    made = world()
    out = stopped(made, tmp_path / "out", stop_after)
    (out / "checkpoints" / "checkpoint-1.2" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"is undamaged \(checkpoint-1.2: manifest.json: No such file.*--overwrite"):
        made.train(out, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-2}, r"training.learning_rate \(was 0.01, is 0.02\)"),
        ({"r": 4}, r"lora.r \(was 16, is 4\)"),
        ({"seed": 1}, r"training.seed \(was 42, is 1\)"),
        ({"gradient_accumulation_steps": 4}, r"rows a step \(was 6, is 8\)"),
        ({"rows": "a"}, "the rows"),
        ({"template": True}, "the tokenizer"),
        ({"weights": True}, "the base weights"),
    ],
)
def test_another_training_is_refused_and_says_what_differs(
    world: Callable[..., World],
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    out = stopped(world(), tmp_path / "out", stop_after)
    if "rows" in changes:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(rows.read_text().replace(" aa.", " ab."))
    other = world(**{name: value for name, value in changes.items() if name not in ("rows", "template", "weights")})
    if "template" in changes:
        other.tokenizer.chat_template = "{{ messages }}"
    if "weights" in changes:
        other.base = copy_with_one_weight_changed(other.base, tmp_path / "base")
    with pytest.raises(InputError) as caught:
        other.train(out, resume=True)
    assert re.fullmatch(
        f"checkpoint-1.2 belongs to another training: different are {named}; restore what differs, or --force .*",
        str(caught.value),
    )


def copy_with_one_weight_changed(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_force_goes_on_with_the_new_settings(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    out = stopped(world(lr_scheduler_type="constant"), tmp_path / "out", stop_after)
    world(lr_scheduler_type="constant", learning_rate=5e-3, weight_decay=0.1).train(out, resume=True, force=True)
    state = json.loads((out / "checkpoints" / "checkpoint-7" / "state.json").read_text())
    group = state["optimizer"]["param_groups"][0]
    assert group["lr"] == 5e-3
    assert group["weight_decay"] == 0.1
    assert state["identity"]["settings"]["training.learning_rate"] == 5e-3


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 4),  # 2 of 6 rows done: from its start
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}, 4),  # 2 of 6 rows done: as two
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}, 3),
    ],
)
def test_another_split_of_the_batch_goes_on_in_the_same_order(
    world: Callable[..., World],
    stop_after: Callable[[int | None], None],
    tmp_path: Path,
    changes: dict[str, Any],
    at: int,
) -> None:
    exact = {"method": "lora", "compute_dtype": "float32", "lora_dropout": 0, "learning_rate": 1e-3}
    world(**exact).train(tmp_path / "straight")
    out = stopped(world(**exact), tmp_path / "out", stop_after, at)
    world(**exact, **changes).train(out, resume=True)
    ours, theirs = everything(out), everything(tmp_path / "straight")
    assert [event["tokens"] for event in ours["events"]] == [event["tokens"] for event in theirs["events"]]
    for name, value in theirs.items():
        if name.startswith("adapter"):
            # Adam turns rounding in a tiny gradient into a visible step; the wrong rows give 1e-3.
            assert (ours[name] - value).abs().max() < 5e-5, name
    losses = [[event["loss"] for event in kind["events"]] for kind in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_neutral_settings_may_change(
    world: Callable[..., World], stop_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    made = world()
    made.train(tmp_path / "straight")
    out = stopped(made, tmp_path / "out", stop_after)
    made.train(out, resume=True, save_steps=3, gradient_checkpointing="always", save_total_limit=3)
    names = [path.name for path in list_checkpoints([out / "checkpoints"])]
    assert names == ["checkpoint-7", "checkpoint-6", "checkpoint-3"]
    ours, theirs = everything(out), everything(tmp_path / "straight")
    assert_same({k: v for k, v in ours.items() if "adapter" in k}, {k: v for k, v in theirs.items() if "adapter" in k})


def test_checkpoints_hold_no_pickle_and_an_adapter_that_peft_reads(world: Callable[..., World], tmp_path: Path) -> None:
    made = world(method="lora")
    made.train(tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints" / "checkpoint-7"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    stock = AutoModelForCausalLM.from_pretrained(made.base)
    loaded = PeftModel.from_pretrained(stock, folder)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name.replace(".weight", ".default.weight")], tensor)
