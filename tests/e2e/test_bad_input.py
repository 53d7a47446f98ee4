"""Wrong input ends in one line and the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

# name -> (flags that replace good ones, exit code, what the line must say)
CASES: dict[str, tuple[dict[str, str], int, str]] = {
    "unknown setting": ({"lerning_rate": "1"}, 2, "did you mean 'learning_rate'"),
    "setting of another tool": ({"load_in_4bit": "true"}, 2, "say method: qlora"),
    "wrong type": ({"learning_rate": "fast"}, 2, "training.learning_rate: got 'fast'"),
    "out of range": ({"r": "0"}, 2, "lora.r: got 0"),
    "unknown method": ({"method": "lorra"}, 2, "'qlora', 'lora' or 'full'"),
    "model folder missing": ({"model_name_or_path": "{tmp}/none"}, 2, "does not exist"),
    "model not a folder": ({"model_name_or_path": "{rows}"}, 2, "is a file"),
    "not a model": ({"model_name_or_path": "{tmp}/empty"}, 2, "no config.json"),
    "not a causal model": ({"model_name_or_path": "{tmp}/encoder"}, 2, "'t5' model"),
    "hub id without network": ({"model_name_or_path": "some/model"}, 3, "the hub cannot be reached"),
    "weights as pickle": ({"model_name_or_path": "{tmp}/pickle"}, 2, "pickle"),
    "truncated safetensors": ({"model_name_or_path": "{tmp}/cut"}, 2, "cut short"),
    "shard missing": ({"model_name_or_path": "{tmp}/shard"}, 2, "shards are missing"),
    "tensor missing": ({"model_name_or_path": "{tmp}/lacking"}, 2, "missing from its files"),
    "tensor not finite": ({"model_name_or_path": "{tmp}/nan"}, 2, "NaN or infinite"),
    "rows missing": ({"dataset_name": "{tmp}/none.jsonl"}, 2, "does not exist"),
    "rows on the hub without network": ({"dataset_name": "some/rows"}, 3, "cannot be fetched"),
    "rows empty": ({"dataset_name": "{tmp}/empty.jsonl"}, 2, "holds no rows"),
    "rows not JSON": ({"dataset_name": "{tmp}/broken.jsonl"}, 2, "broken.jsonl line 2: not JSON"),
    "row without the column": ({"dataset_name": "{tmp}/columns.jsonl"}, 2, "row 2: column 'text' is missing"),
    "row of the wrong type": ({"dataset_name": "{tmp}/types.jsonl"}, 2, "row 2: column 'text' holds a int"),
    "no known columns": ({"dataset_name": "{tmp}/unknown.jsonl"}, 2, "has the columns foo"),
    "rows need a chat template": ({"dataset_name": "{tmp}/chat.jsonl"}, 2, "need a chat template"),
    "unknown chat template": ({"chat_template": "lama"}, 2, "allowed: inst, chatml"),
    "target matches nothing": ({"target_modules": "q_prj"}, 2, "this model has down_proj, gate_proj"),
    "full training of a 4-bit base": ({"model_name_or_path": "{tmp}/packed", "method": "full"}, 2, "stored in 4 bits"),
    "unknown optimizer": ({"optim": "adamw_torch_fusd"}, 2, "did you mean 'adamw_torch_fused'"),
    "optimizer without its library": ({"optim": "galore_adamw"}, 3, "pip install galore-torch"),
    "unknown schedule": ({"lr_scheduler_type": "cosinus"}, 2, "did you mean 'cosine'"),
    "unknown tracker": ({"report_to": "wandbb"}, 3, "is not installed"),
    "output_dir not writable": ({"output_dir": "{rows}/run"}, 2, "cannot be written"),
    "no GPU": ({"device": "cuda"}, 3, "sees no GPU"),
    "max_length too short to learn": ({"max_length": "8"}, 2, "raise --max_length"),
    "push without a name": ({"push_to_hub": "true"}, 2, "needs hub_model_id"),
}


@pytest.fixture
def spoiled(tmp_path: Path, tiny_llama: Callable[..., Path], nybble: Callable[..., Any]) -> Path:
    """Models and rows, each wrong in one way."""
    base = tiny_llama()
    for name in ("pickle", "cut", "shard", "lacking", "nan", "encoder"):
        shutil.copytree(base, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, tmp_path / "lacking/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    rows = {
        "empty": "",
        "broken": '{"text": "a"}\n{"text": \n',
        "columns": '{"text": "a"}\n{"other": "b"}\n',
        "types": '{"text": "a"}\n{"text": 3}\n',
        "unknown": '{"foo": "a"}\n',
        "chat": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    }
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_one_line_the_right_code_and_nothing_left(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, spoiled: Path, name: str
) -> None:
    changes, code, says = CASES[name]
    if "{tmp}/packed" in changes.values():
        assert nybble("quantize", tiny_llama(), "--out", spoiled / "packed").code == 0
    flags = {
        "model_name_or_path": str(tiny_llama()),
        "dataset_name": str(rows_file),
        "output_dir": str(spoiled / "run"),
        "max_steps": "1",
    }
    flags |= {key: value.format(tmp=spoiled, rows=rows_file) for key, value in changes.items()}
    done = nybble("train", *(word for key, value in flags.items() for word in (f"--{key}", value)))
    last = done.err.strip().splitlines()[-1]
    assert done.code == code, done.err
    assert says in last
    assert last.startswith("nybble: ")
    assert "Traceback" not in done.err
    assert not (spoiled / "run").exists()


def test_a_folder_in_use_is_kept(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    words = ("--model_name_or_path", tiny_llama(), "--dataset_name", rows_file, "--output_dir", tmp_path / "run")
    for more, says in (
        ((), "is not empty"),
        (("--overwrite",), "only replaces a former run"),
        (("--resume",), "no check"),
    ):
        done = nybble("train", *words, *more)
        assert done.code == 2
        assert says in done.err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ask", "{tmp}/nowhere", "hello"), "no run directory"),
        (("report", "{tmp}/nowhere"), "no run directory"),
        (("train", "{tmp}/nowhere.yaml"), "does not exist"),
        (("train", "--set", "lr"), "has no '='"),
        (("tarin",), "No such command"),
        (("ask",), "Missing argument"),
        (("train", "stray", "words"), "unexpected word"),
    ],
)
def test_wrong_words(nybble: Callable[..., Any], tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = nybble(*(word.format(tmp=tmp_path) for word in words))
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_damaged_record_is_named(nybble: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    done = nybble("ask", tmp_path, "hello")
    assert done.code == 2
    assert "run.json: damaged" in done.err


def test_debug_shows_the_traceback(nybble: Callable[..., Any]) -> None:
    done = nybble("train", "nowhere.yaml", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
