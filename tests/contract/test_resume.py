"""A training that is stopped anywhere and resumed ends in the very bits of the undisturbed one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nybble.data import Groups
from nybble.errors import InputError, StoppedError
from nybble.storage.checkpoints import list_checkpoints
from nybble.training.dataloader import order_sha256

MICRO_BATCHES = 3 * 7 - 2 * 2  # of the whole training
World = Callable[..., Any]
Stop = Callable[[int | None], None]
Left = Callable[[Path], dict[str, Any]]
Compare = Callable[[dict[str, Any], dict[str, Any]], None]

VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {},
    "lora": {"method": "lora", "compute_dtype": "float32", "lr_scheduler_type": "cosine"},
    "full": {"method": "full", "optim": "sgd"},
    "noise": {"neftune_noise_alpha": 5, "loraplus_lr_ratio": 4, "packing": True, "max_length": 96},
    "packing": {"packing": True, "max_length": 96},
    "dora": {"use_dora": True, "method": "lora", "lora_dropout": 0.3},  # dropout by torch's generator
    "adafactor": {"optim": "adafactor", "method": "lora"},
    "rmsprop": {"optim": "rmsprop", "max_grad_norm": 0},
    "adamw_8bit": {"optim": "adamw_8bit", "method": "full"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_from_anywhere_is_the_undisturbed_training(
    world: World, stop_after: Stop, everything: Left, assert_same: Compare, tmp_path: Path, variant: str
) -> None:
    made = world(**VARIANTS[variant])
    stop_after(None)
    straight = made.train(tmp_path / "straight")
    expected = everything(tmp_path / "straight")
    assert expected["name"] == "checkpoint-7"
    for at in (1, 3, 4, 6, 7, 8, 11, 16) if variant == "qlora" else (2, 7):  # 7: where an epoch ends
        out = tmp_path / f"stopped-{at}"
        stop_after(at)
        with pytest.raises(StoppedError, match="saved; continue with --resume"):
            made.train(out)
        stop_after(None)
        resumed = made.train(out, resume=True)
        assert_same(everything(out), expected)
        assert resumed.train_loss == straight.train_loss


def test_a_training_may_be_stopped_at_every_micro_batch(
    world: World, stop_after: Stop, everything: Left, assert_same: Compare, tmp_path: Path
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
    assert stopped == MICRO_BATCHES - 1
    stop_after(None)
    made.train(tmp_path / "out", resume=True)
    assert_same(everything(tmp_path / "out"), everything(tmp_path / "straight"))


def test_a_damaged_checkpoint_is_passed_over_and_named(
    world: World, stopped: Callable[..., Path], everything: Left, assert_same: Compare, tmp_path: Path
) -> None:
    made = world(save_steps=1)
    made.train(tmp_path / "straight")
    out = stopped(made, tmp_path / "out", at=8)
    assert [path.name for path in list_checkpoints([out / "checkpoints"])] == ["checkpoint-3.1", "checkpoint-3"]
    newest = out / "checkpoints" / "checkpoint-3.1" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    made.train(out, resume=True)
    assert "checkpoint-3.1 is skipped: state.safetensors differs from what was written (SHA-256)" in made.said
    assert f"continuing from {out / 'checkpoints' / 'checkpoint-3'}" in made.said
    assert_same(everything(out), everything(tmp_path / "straight"))


def test_only_damaged_checkpoints_are_no_beginning(world: World, stopped: Callable[..., Path], tmp_path: Path) -> None:
    made = world()
    out = stopped(made, tmp_path / "out")
    (out / "checkpoints" / "checkpoint-1.2" / "manifest.json").unlink()
    with pytest.raises(
        InputError,
        match=r"every checkpoint in .* is damaged \(checkpoint-1.2: manifest.json: No such file.*--overwrite",
    ):
        made.train(out, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-2}, r"training.learning_rate \(was 0.01, is 0.02\)"),
        ({"r": 4}, r"lora.r \(was 16, is 4\)"),
        ({"seed": 1}, r"training.seed \(was 42, is 1\)"),
        (
            {"gradient_accumulation_steps": 4},
            r"rows per step \(was 6, is 8; of all processes .*--train_batch_size 6 keeps it\)",
        ),
        ({"rows": "a"}, "the rows"),
        ({"template": True}, "the tokenizer"),
        ({"weights": True}, "the base weights"),
    ],
)
def test_another_training_is_refused_and_says_what_differs(
    world: World, stopped: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    out = stopped(world(), tmp_path / "out")
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
        f"checkpoint-1.2 belongs to another training, which differs in {named}; restore what differs, or .*--force .*",
        str(caught.value),
    )


def copy_with_one_weight_changed(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_force_goes_on_with_the_new_settings(world: World, stopped: Callable[..., Path], tmp_path: Path) -> None:
    out = stopped(world(lr_scheduler_type="constant"), tmp_path / "out")
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
    world: World, stopped: Callable[..., Path], everything: Left, tmp_path: Path, changes: dict[str, Any], at: int
) -> None:
    exact = {"method": "lora", "compute_dtype": "float32", "lora_dropout": 0, "learning_rate": 1e-3}
    world(**exact).train(tmp_path / "straight")
    out = stopped(world(**exact), tmp_path / "out", at)
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
    world: World, stopped: Callable[..., Path], everything: Left, assert_same: Compare, tmp_path: Path
) -> None:
    made = world()
    made.train(tmp_path / "straight")
    out = stopped(made, tmp_path / "out")
    made.train(out, resume=True, save_steps=3, gradient_checkpointing="always", save_total_limit=3)
    names = [path.name for path in list_checkpoints([out / "checkpoints"])]
    assert names == ["checkpoint-7", "checkpoint-6", "checkpoint-3"]
    ours, theirs = everything(out), everything(tmp_path / "straight")
    assert_same({k: v for k, v in ours.items() if "adapter" in k}, {k: v for k, v in theirs.items() if "adapter" in k})


def test_checkpoints_hold_no_pickle_and_an_adapter_that_peft_reads(world: World, tmp_path: Path) -> None:
    made = world(method="lora")
    made.train(tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints" / "checkpoint-7"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    stock = AutoModelForCausalLM.from_pretrained(made.base)
    loaded = PeftModel.from_pretrained(stock, folder)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name.replace(".weight", ".default.weight")], tensor)


def test_another_order_of_the_rows_is_refused(
    world: World, stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if another version of torch drew other numbers."""
    out = stopped(world(), tmp_path / "out")
    monkeypatch.setattr("nybble.training.dataloader.order_sha256", lambda *_: "other")
    with pytest.raises(InputError, match="draws the rows in another order"):
        world().train(out, resume=True)


def test_the_order_that_is_noted_is_the_order_that_is_drawn(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[int] = []
    take = Groups.__getitem__
    monkeypatch.setattr(Groups, "__getitem__", lambda self, n: drawn.append(n) or take(self, n))
    made = world(save_steps=3, save_total_limit=5)
    made.train(tmp_path / "out")
    for epoch, step in enumerate(
        (3, 6)
    ):  # the cursor of a checkpoint at the end of an epoch is at the next one's start
        cursor = json.loads((tmp_path / "out" / "checkpoints" / f"checkpoint-{step}" / "state.json").read_text())[
            "cursor"
        ]
        assert (cursor["epoch"], cursor["groups"]) == (epoch + 1, 0)
    for epoch in range(2):
        order = torch.tensor(drawn[14 * epoch : 14 * (epoch + 1)])
        assert hashlib.sha256(order.numpy().tobytes()).hexdigest() == order_sha256(14, made.recipe.training.seed, epoch)


def test_a_checkpoint_in_another_format_is_refused_with_the_version_that_reads_it(
    world: World, stopped: Callable[..., Path], tmp_path: Path
) -> None:
    out = stopped(world(), tmp_path / "out")
    folder = out / "checkpoints" / "checkpoint-1.2"
    state = json.loads((folder / "state.json").read_text())
    del state["format"]
    state["versions"]["nybble"] = "0.1.0"
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"checkpoint-1.2 was written by nybble 0.1.0 in a format .* --overwrite"):
        world().train(out, resume=True)


def test_noise_and_rates_do_not_depend_on_the_split_of_the_batch(
    world: World, everything: Left, tmp_path: Path
) -> None:
    exact = {"method": "lora", "compute_dtype": "float32", "lora_dropout": 0, "learning_rate": 1e-3}
    noisy = {**exact, "neftune_noise_alpha": 5, "loraplus_lr_ratio": 4}
    whole = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
    left = []
    for name, settings in {"parts": noisy, "whole": {**noisy, **whole}, "plain": exact}.items():
        world(**settings).train(tmp_path / name)
        left.append(everything(tmp_path / name))
    apart = [
        max((left[0][key] - other[key]).abs().max() for key in other if key.startswith("adapter")) for other in left[1:]
    ]
    assert apart[0] < 5e-5
    assert apart[1] > 1e-3
