"""The checkpoint's folder: what is believed of it, and state without pickles."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.storage.checkpoints import Place, list_checkpoints, newest_checkpoint, verify, write_checkpoint
from nybble.storage.manifest import DamagedError, read_json
from nybble.training.state_codec import CannotPackError, pack, unpack

FILES = [("state.json", b"{}"), ("a.safetensors", b"x" * 100)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoints", Place(3), FILES)


def test_names_say_where_and_sort_by_it(tmp_path: Path) -> None:
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-100.2", "checkpoint-best", ".checkpoint-7.1.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("no folder")
    assert [p.name for p in list_checkpoints([tmp_path, tmp_path / "none"])] == [
        "checkpoint-100.2",
        "checkpoint-100",
        "checkpoint-20",
    ]
    assert Place.of(Path("checkpoint-100.2")) == Place(100, 2)
    assert Place(100, 2).name == "checkpoint-100.2"


def test_what_is_written_is_whole_and_alone(checkpoint: Path) -> None:
    verify(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint-3"]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["a.safetensors", "manifest.json", "state.json"]


def cut(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"x" * 99)


def flip(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"y" + b"x" * 99)


def lose(folder: Path) -> None:
    (folder / "a.safetensors").unlink()


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes(b"x" * 100)
    lose(folder)
    (folder / "a.safetensors").symlink_to(folder.parent / "elsewhere")


def manifest(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**content, **changes}))

    return change


def garbage(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "a.safetensors has 99 bytes, the manifest says 100"),
        (flip, r"a.safetensors differs from what was written \(SHA-256\)"),
        (lose, "a.safetensors: No such file"),
        (link, "a.safetensors is a symbolic link"),
        (garbage, "manifest.json is not JSON"),
        (manifest(format=2), "format 2; the known format is 1"),
        (manifest(files={}), "does not list state.json"),
        (manifest(files={"state.json": {}, "../x": {}}), "not a file inside this folder|state.json has 2 bytes"),
        (manifest(files={"../state.json": {}, "state.json": {"bytes": 2}}), "not a file inside this folder"),
        (manifest(files={"a\0b": {"bytes": 1}, "state.json": {}}), "null byte"),
    ],
)
def test_damage_is_found_and_named(checkpoint: Path, damage: Any, said: str) -> None:
    damage(checkpoint)
    with pytest.raises(DamagedError, match=said):
        verify(checkpoint)
    assert newest_checkpoint([checkpoint.parent])[0] is None


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, Place(step), FILES) for step in (1, 2, 3)]
    cut(folders[2])
    path, skipped = newest_checkpoint([tmp_path])
    assert path == folders[1]
    assert list(skipped) == [folders[2]]


def test_a_huge_json_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "state.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="has more than"):
        read_json(tmp_path / "state.json")


def test_any_state_of_an_optimizer_comes_back_bit_by_bit() -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).to(torch.bfloat16)}, 1: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "fused": None, "params": [0, 1], "worst": math.inf}],
        "random": (3, (1, 2**63), None),
        "numpy": ("MT19937", np.arange(4, dtype=np.uint32), 2),
        "$dict": {"$tensor": "no tensor"},
        "name": "ü",
    }
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(state, tensors), allow_nan=False)), tensors)
    assert back["param_groups"] == state["param_groups"]
    assert back["random"] == state["random"]
    assert back["$dict"] == state["$dict"]
    assert back["numpy"][1].tolist() == [0, 1, 2, 3]
    assert back["numpy"][1].dtype == torch.uint32
    assert back["state"].keys() == {0, 1}
    for name, tensor in state["state"][0].items():
        assert torch.equal(back["state"][0][name], tensor)
        assert back["state"][0][name].dtype == tensor.dtype


def test_what_no_checkpoint_can_hold_is_named() -> None:
    with pytest.raises(CannotPackError, match=r"state.0.projector is a builtins.object"):
        pack({"state": {0: {"projector": object()}}}, {})
