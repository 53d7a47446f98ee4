"""The cache of packed bases: the same model the second time, and never a wrong or damaged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nybble.hardware import detect_device
from nybble.models import find_model, load_model, packed_cache
from nybble.models.packed_cache import PackedCache
from nybble.recipe import ModelSection, QuantizationSection

IDS = torch.arange(4, 36).view(2, 16)
FROM_CACHE = "the packed base is taken from the cache"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "SMALLEST", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def source(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def load(source: Path, **quantization: Any) -> tuple[torch.Tensor, tuple[str, ...], Any]:
    section = ModelSection(model_name_or_path=str(source), device="cpu")
    model, report = load_model(
        find_model(section), "qlora", section, QuantizationSection(**quantization), detect_device("cpu")
    )
    with torch.no_grad():
        return model(IDS).logits, report.notes, report


def test_the_second_start_loads_what_the_first_packed(source: Path, folder: Path) -> None:
    first, notes, report = load(source)
    assert FROM_CACHE not in notes
    second, notes, again = load(source)
    assert FROM_CACHE in notes
    assert torch.equal(first, second)
    assert (report.n_packed, report.packed_bytes, report.left_in_16bit, report.total_parameters) == (
        again.n_packed, again.packed_bytes, again.left_in_16bit, again.total_parameters
    )  # fmt: skip
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "changed", [{"encoder": "absmax"}, {"bnb_4bit_quant_type": "fp4"}, {"skip_modules": ("o_proj",)}], ids=str
)
def test_other_settings_are_another_entry(changed: dict[str, Any], source: Path, folder: Path) -> None:
    load(source)
    assert FROM_CACHE not in load(source, **changed)[1]
    assert FROM_CACHE in load(source, **changed)[1]
    assert len(list(folder.iterdir())) == 2


def test_the_key_is_the_content_and_not_the_time(source: Path) -> None:
    load(source)
    weights = source / "model.safetensors"
    weights.touch()
    assert FROM_CACHE in load(source)[1]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert FROM_CACHE not in load(source)[1]


@pytest.mark.parametrize("harm", ["flip", "cut", "no manifest", "odd manifest"])
def test_a_damaged_entry_is_packed_again(harm: str, source: Path, folder: Path) -> None:
    expected = load(source)[0]
    (entry,) = folder.iterdir()
    weights = entry / "model.safetensors"
    content = weights.read_bytes()
    if harm == "flip":
        weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "cut":
        weights.write_bytes(content[:-1])
    elif harm == "no manifest":
        (entry / "manifest.json").unlink()
    else:
        (entry / "manifest.json").write_text(json.dumps([1]))
    logits, notes, _ = load(source)
    assert FROM_CACHE not in notes
    assert torch.equal(logits, expected)
    assert FROM_CACHE in load(source)[1]


def test_no_cache_means_none(source: Path, folder: Path) -> None:
    load(source, cache=False)
    assert not folder.exists()


def test_a_full_disk_is_said_and_not_fatal(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    notes = load(source)[1]
    assert any("is not cached" in note and "has 1,000 bytes left" in note for note in notes)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_and_not_fatal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file"))
    assert any("is not cached" in note for note in load(source)[1])


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(100))

    kept = PackedCache(450, tmp_path)
    for key in ("a", "b"):
        assert kept.store(key, 200, write) is None
    assert kept.find("a") is not None  # used: now b is the oldest
    assert kept.store("c", 200, write) is None
    assert kept.find("b") is None
    assert kept.find("a") is not None
    assert kept.find("c") is not None
    assert "cache_limit is 450 bytes" in str(kept.store("d", 500, write))


def test_small_models_are_not_worth_keeping(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "SMALLEST", 1 << 28)
    load(source)
    assert not folder.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe garbage", b"\0" * 64, b"0" * 63, b"ab" * 32 + b"\n\n"])
def test_a_remembered_hash_that_is_damaged_is_made_again(tmp_path: Path, damage: bytes) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, weights)
    kept = PackedCache(10**6, tmp_path / "cache")
    first = kept.content(weights)
    (memo,) = (tmp_path / "cache").rglob("*.txt")
    memo.write_bytes(damage)
    assert kept.content(weights) == first == memo.read_text()
