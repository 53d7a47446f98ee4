"""Models with recurrent layers: rows in one sequence, rows alone, rows padded, trees, and generation with a cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nybble.bundled import base_path
from nybble.data import FlatBatch, PadBatch
from nybble.hardware import detect_device
from nybble.models import (
    attach,
    blocks_of,
    find_model,
    load_model,
    recomputable_layers,
    recompute_by,
    set_recomputed,
    swap_blocks,
)
from nybble.models.blocks.attention import over_rows
from nybble.nn import Linear4bit
from nybble.nn.recompute import recomputed
from nybble.nn.rows import current_rows
from nybble.recipe import LoraSection, ModelSection, QuantizationSection
from tools.families import tiny_config, write_tiny
from tools.families.tiny import model_class

# Short convolution; gated delta rule with a decay for each head, and for each column; Mamba-2; Mamba.
CORE = ("lfm2", "qwen3_5_text", "kimi_linear", "nemotron_h", "jamba")
OTHERS = (
    "lfm2_moe",
    "lfm3",
    "qwen3_next",
    "qwen3_5_moe_text",
    "olmo_hybrid",
    "bamba",
    "mamba2",
    "granitemoehybrid",
    "falcon_h1",
    "zamba2",
    "mamba",
    "falcon_mamba",
    "bailing_hybrid",
)
FAMILIES = [*CORE, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)]
LENGTHS = (70, 3, 40, 129)  # the first and the last have several chunks, the second is shorter than the convolution
TREE = [(30, -1), (45, 0), (2, 1), (20, 0)]  # tokens of each segment, and the one that it continues


@cache
def transformers_own(family: str) -> Any:
    """A random model in which every part matters: of the convolutions and states as well."""
    torch.manual_seed(0)
    config = tiny_config(family)
    config._experts_implementation = "eager"  # in any type
    model = model_class(family)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@cache
def ours(family: str, dtype: torch.dtype) -> Any:
    model = copy.deepcopy(transformers_own(family))
    swap_blocks(model)
    return model.to(dtype)


class _Exactly(TorchFunctionMode):
    """Whatever is computed in float32 is computed in float64: transformers' code asks for it in some places."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        return func(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value


def row(length: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [i if n % 3 else -100 for n, i in enumerate(ids)]}


def rows() -> list[dict[str, Any]]:
    return [row(length, seed) for seed, length in enumerate(LENGTHS)]


def derived(model: Any, batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The last hidden states of flattened batches, and the gradients of a weighted sum of those that are learned from.

    Not of the loss, which is in float32 whatever the model is in.
    """
    model.zero_grad()
    states = []
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        rows = over_rows(model, batch["lengths"], batch["parents"]) if blocks_of(model).flattened else nullcontext()
        with _Exactly():
            with rows:
                learned = model.base_model(**inputs).last_hidden_state[0][batch["learned"]]
            weights = torch.outer(torch.sin(1.0 + batch["targets"]), torch.arange(1.0, 1 + learned.shape[1]))
            (learned * torch.sin(weights)).sum().backward()
        states.append(learned.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden states": torch.cat(states), **gradients}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= share * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_one_sequence_give_what_each_gives_alone(family: str) -> None:
    model = ours(family, torch.float64)
    assert blocks_of(model).flattened
    assert blocks_of(model).blocks["recurrent"]
    collate = FlatBatch()
    apart = derived(model, [collate([[r]]) for r in rows()])
    together = derived(model, [collate([[r] for r in rows()])])
    assert_near(together, apart, 1e-10)


@pytest.mark.parametrize("family", CORE)
def test_recomputed_layers_know_the_rows(family: str) -> None:
    model = copy.deepcopy(ours(family, torch.float32)).train()
    layers = recomputable_layers(model)
    recompute_by(layers, recomputed)
    found = []
    for depth in (0, len(layers)):
        set_recomputed(layers, depth)
        model.zero_grad()
        model(**FlatBatch()([[r] for r in rows()]), num_items_in_batch=1).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_near(found[1], found[0], 1e-6)
    assert current_rows() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_is_transformers_own(family: str) -> None:
    batch = [FlatBatch()([[row(150, 7)]])]
    own = derived(copy.deepcopy(transformers_own(family)).double(), batch)
    assert_near(derived(ours(family, torch.float64), batch), own, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_what_each_gives_alone(family: str) -> None:
    """transformers' own path, by which rows are scored: padding enters neither states nor convolutions."""
    model = ours(family, torch.float32)
    batch = PadBatch(0)([[r] for r in rows()])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        for number, r in enumerate(rows()):
            alone = model(input_ids=torch.tensor([r["input_ids"]]), use_cache=False).logits[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_what_its_paths_give(family: str) -> None:
    whole = row(sum(n for n, _ in TREE), 3)
    tree = {**whole, "segments": tuple(TREE)}
    starts = [sum(n for n, _ in TREE[:index]) for index in range(len(TREE))]
    seen: set[int] = set()  # a token is learned once
    paths = []
    for leaf in (2, 3):
        path, segment = [], leaf
        while segment >= 0:
            path = [*range(starts[segment], starts[segment] + TREE[segment][0]), *path]
            segment = TREE[segment][1]
        labels = [-100 if place in seen else whole["labels"][place] for place in path]
        paths.append({"input_ids": [whole["input_ids"][place] for place in path], "labels": labels})
        seen |= set(path)
    model = ours(family, torch.float64)
    apart = derived(model, [FlatBatch()([[path]]) for path in paths])
    together = derived(model, [FlatBatch()([[tree]])])
    assert_near(together, {**apart, "hidden states": apart["hidden states"]}, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_generation_without(family: str) -> None:
    model = ours(family, torch.float32)
    ids = torch.tensor([row(9, 5)["input_ids"]])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, use_cache=True, **settings)
    whole = model(input_ids=cached.sequences, use_cache=False).logits[0]
    for step, logits in enumerate(cached.logits):
        torch.testing.assert_close(logits[0], whole[8 + step], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_5_text", "jamba"])
def test_packed_hybrids_learn_their_rows(family: str, tmp_path: Path) -> None:
    """QLoRA on the flattened step: weights that a layer only reads stay as they are, and the loss falls."""
    folder = write_tiny(family, tmp_path / "base", base_path())
    section = ModelSection(model_name_or_path=str(folder))
    packing, device = QuantizationSection(cache=False), detect_device("cpu")
    model, report = load_model(find_model(section), "qlora", section, packing, device)
    assert report.n_packed
    assert all("dt_proj" not in name for name, module in model.named_modules() if isinstance(module, Linear4bit))
    adapted = attach(model, LoraSection(r=8, lora_alpha=16), "a/base")
    assert all("dt_proj" not in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert blocks_of(adapted).flattened
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    batch, losses = FlatBatch()([[r] for r in rows()]), []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(**batch, num_items_in_batch=len(batch["targets"])).loss
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3  # nats, of rows drawn at random


def test_a_leak_over_the_border_of_rows_is_seen() -> None:
    """Without our functions the layers carry their states on, and the model is not taken for flattened rows."""
    model = copy.deepcopy(ours("qwen3_5_text", torch.float64))
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            del layer.linear_attn.forward
    apart = derived(model, [FlatBatch()([[r]]) for r in rows()])
    together = derived(model, [FlatBatch()([[r] for r in rows()])])
    assert (together["hidden states"] - apart["hidden states"]).norm() > 1e-3 * apart["hidden states"].norm()
