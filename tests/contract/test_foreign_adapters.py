"""Adapters that stock PEFT made, of every kind: loaded and merged, they compute what PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.errors import ModelError
from nybble.exporting.arithmetic import AdapterDelta, write_merged
from nybble.models import BaseWeights, find_model, load_adapter, read_adapter
from nybble.recipe import ModelSection

IDS = torch.arange(4, 36).view(2, 16)
# What PEFT is asked to train beside q_proj: settings, and how many tokens the vocabulary grows by first.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "norms": ({"modules_to_save": ["norm", "input_layernorm"]}, 0),
    "the head, whole": ({"modules_to_save": ["lm_head"]}, 0),
    "embeddings, whole": ({"modules_to_save": ["embed_tokens"]}, 0),
    "both, whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    "both, kept tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0),
    "factors on the head": ({"target_modules": ["q_proj", "lm_head"]}, 0),
    "old tokens": ({"trainable_token_indices": [5, 20, 3]}, 0),
    "new tokens": ({"trainable_token_indices": {"embed_tokens": [128, 129, 130], "lm_head": [128, 129, 130]}}, 3),
    "whole embeddings that grew": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 5),
}


def theirs(source: Path, settings: dict[str, Any], n_new: int) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if n_new:
        model.resize_token_embeddings(model.config.vocab_size + n_new, mean_resizing=False)
    lora = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["q_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(**lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return adapted.eval()


@pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings.*", "ignore:.*tied_target_modules.*", "ignore:.*ensure_weight_ty"
)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_and_merged_it_computes_what_peft_computes(
    kind: str, tied: bool, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    settings, n_new = KINDS[kind]
    if kind == "new tokens" and tied:
        settings = {"trainable_token_indices": settings["trainable_token_indices"]["embed_tokens"]}
    source = tiny_llama(tied=tied)
    model = theirs(source, settings, n_new)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = IDS.clone()
    ids[:, ::3] = torch.arange(128, 128 + n_new).repeat(12)[:12].view(2, 6) if n_new else ids[:, ::3]
    expected = model(ids).logits.detach()

    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)

    out = tmp_path / "merged"
    out.mkdir()
    base = BaseWeights(find_model(ModelSection(model_name_or_path=str(source))))
    with base, AdapterDelta(tmp_path / "adapter") as delta:
        changes = write_merged(base, delta, out, torch.float32)
    config = AutoConfig.from_pretrained(source)
    config.update(changes)
    config.save_pretrained(out)
    merged, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with safe_open(out / "model.safetensors", "pt") as file:  # no second copy of what is still one weight
        stored = set(file.keys())
    keeps = tied and kind not in ("the head, whole", "embeddings, whole", "both, whole", "factors on the head")
    keeps &= kind != "whole embeddings that grew"
    assert ("lm_head.weight" in stored) is not keeps
    assert merged.config.tie_word_embeddings is keeps


def test_rows_of_another_number_than_tokens_are_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    import json

    theirs(tiny_llama(), {"trainable_token_indices": [5, 20, 3]}, 0).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).token_rows() == {"model.embed_tokens": [5, 20, 3]}
    assert read_adapter(tmp_path).n_embeddings("model.embed_tokens") == 21
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": [5, 20]}))
    with pytest.raises(ModelError, match=r"'model\.embed_tokens' has 3 rows for 2 tokens"):
        read_adapter(tmp_path).token_rows()


def test_factors_on_embeddings_are_said_not_to_merge(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    theirs(tiny_llama(), {"target_modules": ["q_proj", "embed_tokens"]}, 0).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    base = BaseWeights(find_model(ModelSection(model_name_or_path=str(tiny_llama()))))
    with base, AdapterDelta(tmp_path) as delta, pytest.raises(ModelError, match="in a way that cannot be merged"):
        write_merged(base, delta, tmp_path, torch.float32)
