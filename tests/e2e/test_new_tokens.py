"""New tokens from the recipe to every way out: trained, asked, merged, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.models import add_new_tokens, attach, save_adapter
from nybble.recipe import LoraSection

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_answers_in_new_tokens_are_learned_and_leave_with_the_model(
    tied: bool, nybble: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [f"<s>[INST] What is {WORDS[i % 8]}? [/INST] [say]It is {WORDS[(i + 1) % 8]}.[done]</s>" for i in range(40)]
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    base = tiny_llama(tied=tied)
    flags = {"model_name_or_path": base, "dataset_name": file, "output_dir": run, "new_tokens": "[say],[done]"}
    flags |= {"learning_rate": 1e-2, "max_steps": 60, "n_samples": 0, "device": "cpu", "report_to": "none"}
    done = nybble("train", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert done.code == 0, done.err
    assert "rows of 2 tokens are learned; 0 of them were in the vocabulary" in done.err
    record = json.loads((run / "run.json").read_text())
    assert record["plan"]["trainable_parameters"] == record["trainable_parameters"]
    assert record["plan"]["total_parameters"] == record["total_parameters"]
    stored = load_file(run / "adapter/adapter_model.safetensors")
    assert sum("trainable_tokens_delta" in name for name in stored) == (1 if tied else 2)
    assert not [name for name in stored if name.endswith(("embed_tokens.weight", "lm_head.weight"))]

    answer = nybble("ask", run, "What is two?", "--json").json["answers"][0]
    assert answer["tuned"].startswith("[say]")
    assert "[done]" in answer["tuned"]
    assert "[say]" not in answer["base"]

    merged = nybble("merge", run, "--out", tmp_path / "merged", "--into", "dequantized", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["verified"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == len(model.lm_head.weight) == 130
    assert model.config.tie_word_embeddings is tied
    assert len(tokenizer("[say]", add_special_tokens=False).input_ids) == 1
    assert nybble("ask", tmp_path / "merged", "What is two?", "--json").json["answers"][0]["tuned"].startswith("[say]")

    alone = nybble("export", run, "--gguf", tmp_path / "adapter.gguf", "--gguf_type", "adapter")
    assert alone.code == 2
    assert "export the whole model" in alone.err


def test_an_adapter_with_new_tokens_is_exported_as_one_file(
    nybble: Callable[..., Any], shared_data: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    base = shared_data / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = add_new_tokens(tokenizer, ["<say>", "</say>", "<pause>"])
    model = attach(AutoModelForCausalLM.from_pretrained(base), LoraSection(r=4), str(base), tokens=tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "model.gguf"
    done = nybble("export", tmp_path / "adapter", "--gguf", file, "--gguf_type", "bf16", "--json")
    assert done.code == 0, done.err
    assert done.json["texts_with_other_ids"] == []
    assert done.json["mean_kl"] < 1e-4
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-3:] == ["<say>", "</say>", "<pause>"]


def test_modules_that_are_trained_whole_leave_with_the_model(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = {"model_name_or_path": tiny_llama(), "dataset_name": rows_file, "output_dir": run, "r": 4}
    flags |= {"modules_to_save": "lm_head,embed_tokens", "learning_rate": 1e-2, "max_steps": 6, "report_to": "none"}
    flags |= {"gradient_checkpointing": "always", "n_samples": 0, "device": "cpu"}
    done = nybble("train", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert done.code == 0, done.err
    record = json.loads((run / "run.json").read_text())
    assert record["plan"]["trainable_parameters"] == record["trainable_parameters"]
    stored = load_file(run / "adapter/adapter_model.safetensors")
    base = load_file(tiny_llama() / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert stored[f"base_model.model.{name}"].dtype == torch.float32
        assert not torch.allclose(stored[f"base_model.model.{name}"], base[name], atol=1e-3)
    merged = nybble("merge", run, "--out", tmp_path / "merged", "--into", "dequantized", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["verified"]
    asked = [nybble("ask", one, "What is two?", "--json").json["answers"][0] for one in (run, tmp_path / "merged")]
    assert asked[0]["tuned"] == asked[1]["tuned"]
