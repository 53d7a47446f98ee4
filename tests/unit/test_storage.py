"""What storage promises by itself: shards named as the hub names them, temporary files that can be told and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from nybble.storage.atomic import atomic_file, atomic_folder, is_left_over, remove_left_overs
from nybble.storage.manifest import DamagedError, entries_of, verify_files
from nybble.storage.shards import plan_shards


def test_shards_are_those_of_the_hub() -> None:
    sizes = {"a": 240, "b": 240, "c": 1600, "d": 40, "e": 40}
    tensors = {name: torch.zeros(n // 4) for name, n in sizes.items()}
    hub = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=400)
    shards = plan_shards("model", sizes, 400)
    assert shards.files == hub.filename_to_tensors
    assert shards.total_bytes == sum(sizes.values())
    assert sorted(name for names in shards.files.values() for name in names) == sorted(sizes)


def test_what_fits_is_one_file_without_an_index(tmp_path: Path) -> None:
    shards = plan_shards("{odd}", {"a": 8}, 400)
    assert shards.files == {"{odd}.safetensors": ["a"]}
    shards.write_index(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert plan_shards("state", {}, 400).files == {"state.safetensors": []}


def test_the_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    shards = plan_shards("model", {"a": 400, "b": 400}, 400)
    shards.write_index(tmp_path)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 800},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def crash() -> None:
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("half")
            assert is_left_over(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("replace", "content"), [(True, "new"), (False, "old")])
def test_an_existing_folder_is_replaced_if_asked_for(tmp_path: Path, replace: bool, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    with atomic_folder(tmp_path / "a", replace=replace) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_replaced_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_left_overs_of_one_destination_are_removed(tmp_path: Path) -> None:
    for name in (".a.7.partial", ".ab.7.partial", ".a.b.7.partial", ".a.7.tmp"):
        (tmp_path / name).mkdir()
    remove_left_overs(tmp_path, of=tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.b.7.partial", ".ab.7.partial"]
    remove_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_bytes(b"x")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").read_bytes() == b"x"


def test_a_manifest_notices_what_changed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    entries = entries_of(tmp_path, [tmp_path / "f"])
    verify_files(tmp_path, entries)
    (tmp_path / "f").write_bytes(b"y")
    with pytest.raises(DamagedError, match="f differs from what was written"):
        verify_files(tmp_path, entries)
