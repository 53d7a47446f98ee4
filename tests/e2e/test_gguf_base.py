"""A GGUF file as a base: read by the tables that exports write by, and refused where something would be lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nybble.bundled import base_path, heldout_rows_path
from nybble.errors import ModelError
from nybble.exporting.gguf import write_gguf
from nybble.models import find_model
from nybble.models.gguf_families import FAMILIES
from nybble.recipe import ModelSection
from tests.e2e.test_export import move_from_where_they_start, write_tokenizer
from tools.families import write_tiny

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

READ = ("llama", "gemma3_text", "granite")  # by transformers' reader, with nested rotations, by the table alone
MORE = sorted(FAMILIES.keys() - {*READ, "exaone4", "gemma4_text", "ministral", "ministral3", "olmo3", "qwen3_5_text"})


def source_of(folder: Path | str) -> Any:
    """The model in a folder or file."""
    return find_model(ModelSection(model_name_or_path=str(folder)))


def written(folder: Path, file: Path, outtype: str = "bf16") -> Path:
    """The model in `folder` as GGUF."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_gguf(source_of(folder), tokenizer, (tokenizer.eos_token_id,), file, outtype, progress=lambda *_: None)
    return file


@pytest.mark.parametrize("family", [*READ, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)])
def test_the_weights_and_settings_of_a_file_come_back(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tokenizer(model, family)
    write_tiny(family, model, model, vocab_size=1024)
    move_from_where_they_start(model / "model.safetensors")
    read = source_of(written(model, tmp_path / "x.gguf"))
    assert read.name == str(tmp_path / "x.gguf")
    weights = {name: weight for file in read.folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    own = load_file(model / "model.safetensors")
    if read.config.tie_word_embeddings:
        own.pop("lm_head.weight", None)
    assert weights.keys() == own.keys()
    for name, weight in own.items():
        as_stored = weight.to(torch.bfloat16) if weight.ndim > 1 and "conv" not in name else weight
        torch.testing.assert_close(weights[name].float(), as_stored.float(), rtol=1e-5, atol=1e-6)
    before = source_of(model).config
    for name in ("hidden_act", "rms_norm_eps", "query_pre_attn_scalar", "sliding_window", "attention_multiplier"):
        read_value, own_value = getattr(read.config, name, None), getattr(before, name, None)
        assert read_value == (pytest.approx(own_value, rel=1e-6) if isinstance(own_value, float) else own_value), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base in blocks of 8 bits."""
    return written(base_path(), tmp_path_factory.mktemp("gguf") / "base.gguf", "q8_0")


def test_a_file_is_trained_asked_and_merged(base: Path, nybble: Callable[..., Any], tmp_path: Path) -> None:
    rows = ("--dataset_name", heldout_rows_path(), "--max_steps", 1, "--max_eval_rows", 4)
    settings = ("--model_name_or_path", base, *rows, "--output_dir", tmp_path / "run", "--device", "cpu")
    done = nybble("train", *settings)
    assert done.code == 0, done.err
    assert nybble("ask", tmp_path / "run", "Who are you?", "--max_new_tokens", 2).code == 0
    done = nybble("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def edited(base: Path, file: Path, old: bytes, new: bytes) -> Path:
    """A copy in which the first `old` is `new`, which is as long."""
    content = base.read_bytes()
    assert old in content
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))
    return file


def test_what_cannot_be_read_is_named(base: Path, tmp_path: Path) -> None:
    content = base.read_bytes()
    file = tmp_path / "x.gguf"
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"x.gguf cannot be read as GGUF \(.*\); download it again"):
        source_of(file)
    file.write_bytes(content[:3000])
    with pytest.raises(ModelError, match=r"cannot be read as GGUF"):
        source_of(file)
    file.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"x.gguf is a file, and no GGUF; give a model folder, a hub id or a .gguf"):
        source_of(file)
    edited(base, file, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba")
    with pytest.raises(ModelError, match=r"architecture 'mamba' is not supported; allowed: arcee, "):
        source_of(file)
    edited(base, file, b"blk.1.attn_q.weight", b"blk.1.attn_x.weight")
    with pytest.raises(ModelError, match=r"1 tensors are missing, e.g. model.layers.1.self_attn.q_proj.weight"):
        source_of(file)
    edited(base, file, b"llama.context_length", b"llama.expert_is_used")
    with pytest.raises(ModelError, match=r"llama.expert_is_used is \d+, which no 'llama' of transformers has"):
        source_of(file)
    kind = gguf.GGMLQuantizationType.Q8_0.value.to_bytes(4, "little")
    at = content.index(b"blk.1.attn_q.weight") + len("blk.1.attn_q.weight") + 4 + 16
    assert content[at : at + 4] == kind
    file.write_bytes(content[:at] + (777).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ModelError, match=r"777\)? is not a valid GGMLQuantizationType"):
        source_of(file)
    edited(base, file, b"tokenizer.ggml.tokens", b"tokenizer.ggml.tocens")
    with pytest.raises(ModelError, match=r"transformers cannot read its tokenizer \(.*\); give the model in safe"):
        source_of(file)


def test_a_part_of_a_file_and_a_type_without_a_decoder_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"one part of several; join them with llama-gguf-split --merge"):
        source_of(tmp_path / "part.gguf")

    def undecoded(*_: Any) -> None:
        raise NotImplementedError

    shutil.copy(base, tmp_path / "x.gguf")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(gguf, "dequantize", undecoded)
    with pytest.raises(ModelError, match=r"tensors of type \S+ cannot be decoded \(package gguf\); give a file of F16"):
        source_of(tmp_path / "x.gguf")


def test_the_missing_package_is_named(base: Path, nybble: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    done = nybble("plan", "--model_name_or_path", base, "--dataset_name", heldout_rows_path())
    assert (done.code, "pip install 'nybble[gguf]'" in done.err) == (3, True)
