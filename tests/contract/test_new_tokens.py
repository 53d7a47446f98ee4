"""New tokens: rows learned as PEFT learns them, by our blocks, in an adapter that stock PEFT loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nybble.data import FlatBatch, PadBatch
from nybble.errors import RecipeError
from nybble.models import NewTokens, add_new_tokens, attach, blocks_of, load_adapter, save_adapter, swap_blocks
from nybble.models.blocks import has_fused_head
from nybble.models.vocabulary import make_room
from nybble.planning import make_plan, named_profile
from nybble.recipe import LoraSection, load_recipe

VOCABULARY = 320
TOKENS = NewTokens((VOCABULARY, VOCABULARY + 1, 7), VOCABULARY)  # two that are new, and one that is known
KINDS = [("llama", False), ("llama", True), ("gemma3_text", True), ("qwen2", False)]


def config(kind: str = "llama", tied: bool = False) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    head = {"head_dim": 16} if kind == "gemma3_text" else {}
    return AutoConfig.for_model(
        kind, **sizes, **head, vocab_size=VOCABULARY, num_hidden_layers=2, tie_word_embeddings=tied, pad_token_id=0
    )


def bare(kind: str = "llama", tied: bool = False) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(kind, tied), attn_implementation="sdpa")


def ours(base: Any) -> Any:
    twin = copy.deepcopy(base)
    assert swap_blocks(twin).flattened
    return with_effect(attach(twin, LoraSection(r=4, target_modules="q_proj"), "a/base", tokens=TOKENS))


def grown(base: Any) -> Any:
    twin = copy.deepcopy(base)
    make_room(twin, TOKENS)
    return twin


def with_effect(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                start = 0 if "lora_" in name else parameter  # PEFT's factors start at random
                parameter.copy_(start + torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def rows() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in (19, 30, 7):
        ids = torch.randint(1, 300, (length,), generator=generator)
        ids[::4] = torch.tensor(TOKENS.ids).repeat(10)[: len(ids[::4])]
        made.append([{"input_ids": ids.tolist(), "labels": [t if n % 3 else -100 for n, t in enumerate(ids.tolist())]}])
    return made


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    n = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch, num_items_in_batch=n).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_losses_and_gradients_are_those_of_peft(kind: str, tied: bool) -> None:
    base = bare(kind, tied)
    mine = ours(base)
    indices = {"model.embed_tokens": [*TOKENS.ids]} | ({} if tied else {"lm_head": [*TOKENS.ids]})
    assert mine.peft_config["default"].trainable_token_indices == indices
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj"])
    lora.trainable_token_indices = indices
    stock = with_effect(get_peft_model(grown(base), lora))
    expected_loss, expected = gradients(stock, PadBatch(0)(rows()))
    loss, found = gradients(mine, FlatBatch()(rows()))
    assert has_fused_head(mine.get_base_model())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sum("trainable_tokens" in name for name in found) == (1 if tied else 2)
    # Without labels, and evaluated: all logits, those of the rows among them.
    ids = torch.tensor([rows()[1][0]["input_ids"]])
    torch.testing.assert_close(mine(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(ids).logits, stock.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        flat = FlatBatch()(rows())
        assert float(mine(**flat).loss) == pytest.approx(expected_loss, rel=1e-5)
        with mine.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(mine(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_saved_adapter_loads_in_stock_peft_over_a_base_of_its_size_and_here(tied: bool, tmp_path: Path) -> None:
    base = bare(tied=tied)
    mine = ours(base).eval()
    save_adapter(mine, tmp_path)
    ids = torch.tensor([rows()[1][0]["input_ids"]])
    expected = mine(ids).logits.detach()
    theirs = copy.deepcopy(base)
    theirs.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)  # with other rows, which do not count
    stock = PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-4)
    here = copy.deepcopy(base)
    swap_blocks(here)
    loaded = load_adapter(here, tmp_path).eval()
    assert blocks_of(loaded).flattened
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert loaded.config.vocab_size == VOCABULARY + 2


def test_new_rows_start_as_the_mean_and_known_ones_as_they_are() -> None:
    base = bare()
    mean = base.lm_head.weight.detach().mean(dim=0)
    old = base.lm_head.weight.detach().clone()
    first, again = (grown(base).lm_head.weight.detach() for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:VOCABULARY], old)
    torch.testing.assert_close(first[VOCABULARY:], mean.expand(2, -1))
    spare = copy.deepcopy(base)  # places that no token takes yet: the first 300 are tokens
    make_room(spare, NewTokens((300, 301), 300))
    assert spare.config.vocab_size == len(spare.lm_head.weight) == VOCABULARY
    torch.testing.assert_close(spare.lm_head.weight[300:302].detach(), old[:300].mean(dim=0).expand(2, -1))
    assert torch.equal(spare.lm_head.weight[302:].detach(), old[302:])


def test_the_tokenizer_has_one_token_for_each(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    size = len(tokenizer)
    tokens = add_new_tokens(tokenizer, ["<say>", "</say>", tokenizer.eos_token])
    assert tokens == NewTokens((size, size + 1, tokenizer.eos_token_id), size)
    assert tokens.n_embeddings == size + 2
    ids = tokenizer("a<say>b</say>").input_ids
    assert [ids.count(token) for token in tokens.ids[:2]] == [1, 1]
    assert "<say>" in tokenizer.decode(ids, skip_special_tokens=True)  # words of an answer, not marks around it
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a<say>b</say>").input_ids == ids
    assert add_new_tokens(AutoTokenizer.from_pretrained(tmp_path), ["<say>"]).ids == (size,)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_plan_counts_the_rows(tied: bool) -> None:
    values = {"r": 4, "target_modules": "q_proj", "max_length": 32, "method": "lora"}
    plain, more = (
        make_plan(load_recipe(None, {**values, **new}), config(tied=tied), named_profile("rtx4090"))
        for new in ({}, {"new_tokens": "<a>,<b>,<c>"})
    )
    assert more.trainable_parameters - plain.trainable_parameters == 3 * 64 * (1 if tied else 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"new_tokens": "<a>", "method": "full"}, "new_tokens learns rows beside adapters"),
        ({"new_tokens": "<a>,<a>"}, "'<a>' is given twice"),
        ({"new_tokens": ["<a>", " "]}, "' ' is empty"),
        ({"new_tokens": "<a>", "target_modules": "lm_head,q_proj"}, "lm_head cannot have an adapter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(load_recipe(None, {"max_length": 32, **settings}), config(), named_profile("rtx4090"))
