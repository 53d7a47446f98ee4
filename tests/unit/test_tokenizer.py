"""Folders whose tokenizer cannot be read say what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nybble.errors import CannotRunError, ModelError
from nybble.models import find_tokenizer, tokenizer
from nybble.recipe import ModelSection

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"  # the first piece of such a model


def refusal(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    with pytest.raises((ModelError, CannotRunError)) as caught:
        find_tokenizer(ModelSection(tokenizer_name_or_path=str(folder)))
    return str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_alone_names_what_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(tokenizer, "_READERS", {"sentencepiece": "no_such.module", "protobuf": "json"})
    assert refusal(tmp_path) == (
        f"{tmp_path / name} is a SentencePiece model, and sentencepiece is not installed; pip install sentencepiece, "
        "or give a folder with tokenizer.json"
    )
    monkeypatch.setattr(tokenizer, "_READERS", {"sentencepiece": "no_such", "protobuf": "no_such.either"})
    assert "pip install sentencepiece protobuf, or" in refusal(tmp_path)


def test_another_kind_of_file_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    monkeypatch.setattr(tokenizer, "_READERS", {"sentencepiece": "no_such"})
    assert "sentencepiece" not in refusal(tmp_path)


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "models/stories260K"])
def test_models_of_the_field_are_known_as_such(
    folder: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shared_data / folder / "tokenizer.model", tmp_path)
    monkeypatch.setattr(tokenizer, "_READERS", {"sentencepiece": "no_such"})
    assert "pip install sentencepiece" in refusal(tmp_path)
    shutil.copy(shared_data / folder / "tokenizer.json", tmp_path)
    assert find_tokenizer(ModelSection(tokenizer_name_or_path=str(tmp_path)))[0].eos_token_id == 2
