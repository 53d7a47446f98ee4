"""Our blocks against transformers and PEFT as they are: loss and gradients on padded rows, family by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.data import FlatBatch, PadBatch
from nybble.models import (
    MEMORY_SAVERS,
    MemorySavers,
    attach,
    bare_model,
    blocks_of,
    choice_for,
    decoder_layers,
    meta_model,
    recomputable_layers,
    recompute_by,
    set_recomputed,
    swap_blocks,
    with_layers,
)
from nybble.nn import Linear4bit
from nybble.nn.attention import attend_cached
from nybble.nn.recompute import recomputed
from nybble.nn.rows import current_rows
from nybble.nn.workspace import workspace
from nybble.planning.traced_step import reusing
from nybble.quant import decode, encode
from nybble.recipe import LoraSection, load_recipe
from nybble.training.evaluate import batches_for, device_of
from tools.families import tiny_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
# Windows are shorter than the longest row, so that a wrong one shows.
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5},
}
LENGTHS = (5, 17, 1, 30)


def build(family: str, **changes: Any) -> Any:
    """A random model in float32."""
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRAS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=choice_for(config)).float()
    move(model)
    return model


def move(model: Any) -> None:
    """Move norms and biases away from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)


def ours_of(model: Any) -> Any:
    twin = copy.deepcopy(model)
    assert swap_blocks(twin).flattened
    return twin


def pack(model: Any) -> None:
    """Linears to 4 bits, as loading does."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, module.bias is not None)
            layer.compute_dtype = torch.float32
            layer.set_packed(encode(module.weight.detach()))
            layer.bias = module.bias if module.bias is None else nn.Parameter(module.bias.detach(), False)
            model.set_submodule(name, layer)


def adapt(model: Any, **lora: Any) -> Any:
    """With adapters that do something, and dropout as asked."""
    from peft import LoraConfig, get_peft_model

    wanted = lora.get("target_modules", "all-linear")
    wanted = wanted if wanted == "all-linear" else wanted.split(",")
    section = LoraSection(r=4, lora_alpha=8, **lora)
    if blocks_of(model).flattened:
        adapted = attach(model, section, "a/base")
    else:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=wanted)
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted.train()


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in lengths:
        ids = torch.randint(1, 300, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [i if n % 3 else -100 for n, i in enumerate(ids)]})
    return made


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    # n learned tokens on both sides: the padded loss counts them itself, the flat one is told.
    n = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch, num_items_in_batch=n).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def largest_relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
def test_loss_and_gradients_are_those_of_peft_on_padded_rows(family: str, targets: str) -> None:
    if family == "phi3" and targets != "all-linear":
        targets = "qkv_proj,gate_up_proj"
    model = build(family)
    pack(twin := copy.deepcopy(model))
    with torch.no_grad():  # the stock model computes with what 4 bits hold
        for name, module in twin.named_modules():
            if isinstance(module, Linear4bit):
                model.get_submodule(name).weight.copy_(decode(module.packed, torch.float32))
    ours = ours_of(twin)
    stock, mine = adapt(model, target_modules=targets), adapt(ours, target_modules=targets)
    loss, expected = gradients(stock, PadBatch(0)([rows()]))
    got, found = gradients(mine, FlatBatch()([rows()]))
    assert got == pytest.approx(loss, rel=1e-6)
    assert largest_relative(expected, found) < 1e-5  # measured 1e-6 to 4e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
def test_an_adapter_on_the_head_is_part_of_the_loss(family: str) -> None:
    model = build(family, tie_word_embeddings=False)
    targets = "q_proj,lm_head"
    ours = ours_of(model)  # before PEFT changes the stock one
    stock, mine = adapt(model, target_modules=targets), adapt(ours, target_modules=targets)
    loss, expected = gradients(stock, PadBatch(0)([rows()]))
    got, found = gradients(mine, FlatBatch()([rows()]))
    assert any("lm_head" in name for name in found)
    assert got == pytest.approx(loss, rel=1e-6)
    assert largest_relative(expected, found) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_training_has_the_gradients_of_transformers(family: str) -> None:
    model = build(family).train()
    ours = ours_of(model).train()
    loss, expected = gradients(model, PadBatch(0)([rows()]))
    got, found = gradients(ours, FlatBatch()([rows()]))
    assert got == pytest.approx(loss, rel=1e-6)
    # A padding token's embedding and what only the first token sees get nothing on one side and zeros on the other.
    shared = {name: grad for name, grad in expected.items() if float(grad.norm()) > 0}
    assert largest_relative(shared, {name: found[name] for name in shared}) < 1e-5


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "hunyuan_v1_dense", "olmo3", "qwen3_moe"])
def test_full_training_in_bfloat16_is_near_that_of_transformers(family: str) -> None:
    """Masters are float32 and products bfloat16, so that a norm that is trained gives float32 where others do not."""
    if family in FAMILIES:
        model = build(family).train()
    else:
        move(model := AutoModelForCausalLM.from_config(tiny_config(family, 300)).float().train())
    ours = ours_of(model).train()
    assert blocks_of(ours).flattened
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = gradients(model, PadBatch(0)([rows()]))
        got, found = gradients(ours, FlatBatch()([rows()]))
    assert got == pytest.approx(loss, rel=5e-3)
    assert found.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    whole = [torch.cat([grads[name].flatten() for name in sorted(expected)]) for grads in (expected, found)]
    assert float(torch.cosine_similarity(*whole, dim=0)) > 0.99


def test_no_row_sees_another() -> None:
    ours = adapt(ours_of(build("llama")))
    one, two = rows((9, 12)), rows((9, 12))
    two[0]["input_ids"] = [7] * 9
    hidden = []
    for batch in (FlatBatch()([one]), FlatBatch()([two])):
        inner = {k: batch[k] for k in ("input_ids", "position_ids", "lengths")}
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        hidden.append(ours.get_base_model().model(**inner, attention_mask=mask, use_cache=False).last_hidden_state)
    assert torch.equal(hidden[0][:, 9:], hidden[1][:, 9:])
    assert not torch.equal(hidden[0][:, :9], hidden[1][:, :9])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
def test_recomputed_layers_give_the_same_bits(family: str, depth: int) -> None:
    ours = adapt(ours_of(build(family)), lora_dropout=0.1)
    layers = ours.get_base_model().model.layers
    share(ours)
    batch = FlatBatch()([rows()])
    _, plain = gradients(ours, batch)
    for layer in layers[:depth]:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recomputed
    _, again = gradients(ours, batch)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("n_savers", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
def test_every_rung_gives_the_same_gradients(family: str, n_savers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.blocks.mlp._TILE_ROWS", 16)
    monkeypatch.setattr("nybble.models.memory_savers._SLICE_ELEMENTS", 256)
    model = ours_of(build(family))
    pack(model)
    ours = adapt(model, lora_dropout=0.1)
    share(ours)
    batch = FlatBatch()([rows()])
    _, plain = gradients(ours, batch)
    with torch.no_grad():
        judged = ours(**batch).token_losses
    savers = MemorySavers(ours)
    names = tuple(MEMORY_SAVERS)[:n_savers]
    assert ("embedding" in savers.available) == (not ours.config.tie_word_embeddings)
    savers.apply(names)
    for layer in ours.get_base_model().model.layers:
        layer.gradient_checkpointing = True
    with reusing():
        for _ in range(2):  # the store is empty again after a step
            _, lean = gradients(ours, batch)
            assert largest_relative(plain, lean) < 1e-5
        with torch.no_grad():
            assert torch.allclose(ours(**batch).token_losses, judged, atol=1e-6)
        assert bool(workspace.pieces()) == ("slices" not in names)


@pytest.mark.parametrize("family", ["cohere2", "olmo2"])
def test_tiles_and_recomputation_respect_what_else_uses_an_mlp_s_ends(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention beside the MLP keeps the MLP's input (Cohere); a norm behind it keeps its output (OLMo 2)."""
    monkeypatch.setattr("nybble.models.blocks.mlp._TILE_ROWS", 16)
    model = AutoModelForCausalLM.from_config(tiny_config(family, 300)).float()
    move(model)
    ours = adapt(ours_of(model))
    batch = FlatBatch()([rows()])
    _, plain = gradients(ours, batch)
    for layer in decoder_layers(ours):
        layer.mlp.nybble_tiles = True
    _, tiled = gradients(ours, batch)
    assert largest_relative(plain, tiled) < 1e-5
    layers = recomputable_layers(ours)
    recompute_by(layers, recomputed)
    set_recomputed(layers, len(layers))
    _, again = gradients(ours, batch)
    assert largest_relative(plain, again) < 1e-5


def test_a_table_on_the_host_stays_there_when_the_model_moves() -> None:
    ours = adapt(ours_of(build("llama")))
    MemorySavers(ours).apply(["embedding"])
    ours.to("meta")
    table = ours.get_input_embeddings().weight
    assert table.device.type == "cpu"
    assert device_of(ours).type == "meta"  # where batches go
    assert {p.device.type for p in ours.parameters() if p is not table} == {"meta"}


def test_a_layer_input_on_the_host_is_let_go() -> None:
    """A pass that fails leaves its copies; the next begins without them."""
    ours = adapt(ours_of(build("llama")))
    savers = MemorySavers(ours)
    savers.apply(["inputs"])
    for layer in ours.get_base_model().model.layers:
        layer.gradient_checkpointing = True
    ours(**FlatBatch()([rows()]), num_items_in_batch=1)
    assert len(savers._store._kept) == 3
    savers.apply(["inputs"])
    assert not savers._store._kept


def share(model: Any) -> None:
    from nybble.models.lora_linear import share_seeds
    from nybble.nn.dropout_seed import DropoutSeeds

    share_seeds(model, DropoutSeeds(seed=1, micro_step=4))


def test_what_nothing_keeps_is_not_recomputed() -> None:
    """Of a recomputed layer's seven products the last, down, is left out: 6 more, not 7."""
    ours = adapt(ours_of(build("llama")), target_modules="q_proj")
    counts = []
    for depth in (0, 3):
        for layer in ours.get_base_model().model.layers[:depth]:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recomputed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            gradients(ours, FlatBatch()([rows()]))
        counts.append(sum(e.count for e in seen.key_averages() if e.key == "aten::mm"))
    lora_again = 1  # x A^T of q
    assert counts[1] - counts[0] == 3 * (6 + lora_again)


# Family -> the kinds of blocks that Nybble computes; norms by torch's own operator (LayerNorm) are not counted.
FULL = """aria_text cohere cohere2 deepseek_v3 exaone4 gemma gemma2 gemma3_text gemma4_text glm glm4 granite helium
hunyuan_v1_dense internlm3 llama minicpm3 ministral mistral olmo2 olmo3 phi3 qwen2 qwen3 seed_oss smollm3 vaultgemma"""
WITHOUT_MLP = "arcee gpt_oss granitemoe mixtral qwen3_moe"
WITHOUT_NORMS = "stablelm olmo"
WITHOUT_BOTH = "gpt2 gpt_neox nanochat nemotron opt phi starcoder2"
PADDED = "bloom falcon gptj mpt"
KINDS = (
    (FULL, "attention mlp norm loss"),
    (WITHOUT_MLP, "attention norm loss"),
    (WITHOUT_NORMS, "attention mlp loss"),
    (WITHOUT_BOTH, "attention loss"),
    (PADDED, ""),
)
EVERY = {family: kinds for families, kinds in KINDS for family in families.split()}
ANSWERED = "gpt_oss granite nemotron qwen3_moe smollm3 stablelm starcoder2 vaultgemma"
TARGETS = dict.fromkeys(  # experts aside
    ("aria_text", "deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe"), "o_proj"
)
# Random models of it multiply rounding: transformers' own gradients in float32 are 3e-5 from those in float64.
ROUGH = ("gemma4_text",)


@pytest.mark.parametrize("family", sorted(EVERY))
@pytest.mark.filterwarnings("ignore:It is strongly recommended to train Gemma:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # of PEFT, for Conv1D
def test_every_family_trains_as_with_transformers_and_peft(family: str) -> None:
    config = tiny_config(family, 300)
    for name in vars(config):
        if "dropout" in name or "pdrop" in name:
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=choice_for(config)).float()
    move(model)
    ours = copy.deepcopy(model)
    report = swap_blocks(ours)
    assert set(report.blocks) == set(EVERY[family].split())
    assert report.flattened == bool(EVERY[family])
    if family == "gpt2":  # whose layers are no linears
        mine, stock = ours.train(), model.train()
    else:
        mine = adapt(ours, target_modules=TARGETS.get(family, "all-linear"))
        stock = adapt(model, target_modules=",".join(sorted(mine.peft_config["default"].target_modules)))
    loss, expected = gradients(stock, PadBatch(0)([rows()]))
    got, found = gradients(mine, (FlatBatch() if report.flattened else PadBatch(0))([rows()]))
    assert got == pytest.approx(loss, rel=1e-6)
    if family in ROUGH:
        _, exact = gradients(stock.double(), PadBatch(0)([rows()]))
        expected_apart, apart = (
            largest_relative(exact, {name: grad.double() for name, grad in side.items()}) for side in (expected, found)
        )
        assert apart < 1.2 * expected_apart
    else:
        assert largest_relative(expected, found) < 1e-5


def test_outside_of_flattened_rows_a_config_says_what_it_said() -> None:
    ours = AutoModelForCausalLM.from_config(tiny_config("olmo2", 300))
    swap_blocks(ours)
    seen = []
    attention = ours.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda *_: seen.append((ours.config._attn_implementation, current_rows())))
    layers = ours.model.layers
    recompute_by(layers, recomputed)
    set_recomputed(layers, len(layers))
    batch = FlatBatch()([rows()])
    ours.train()(**batch, num_items_in_batch=1).loss.backward()
    assert [name for name, _ in seen] == ["nybble", "nybble"]  # forward, and again in the backward pass
    assert {rows.lengths for _, rows in seen} == {batch["lengths"]}
    assert (ours.config._attn_implementation, current_rows()) == ("sdpa", None)
    with pytest.raises(IndexError):  # also after an error
        ours(**{**batch, "input_ids": batch["input_ids"] + 999}, num_items_in_batch=1)
    assert (ours.config._attn_implementation, current_rows()) == ("sdpa", None)


def test_attention_with_dropout_runs_over_rows() -> None:
    config = tiny_config("seed_oss", 300)
    config.attention_dropout, config.residual_dropout = 0.5, 0.0
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=choice_for(config)).float()
    stock = copy.deepcopy(ours)
    report = swap_blocks(ours)
    assert (report.flattened, report.trees) == (True, False)
    assert "dropout" in str(report.reason)
    batch = batches_for(ours, None)([rows()])
    n = len(batch["targets"])
    quiet = ours.eval()(**batch, num_items_in_batch=n).loss.item()
    assert quiet == pytest.approx(stock.eval()(**PadBatch(0)([rows()]), num_items_in_batch=n).loss.item(), rel=1e-6)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(ours.train()(**batch, num_items_in_batch=n).loss.item())
    assert losses[0] == losses[1] != losses[2]
    assert quiet not in losses
    tree = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "segments": ((2, -1), (1, 0), (1, 0))}]
    batch = batches_for(ours, None)([tree])
    assert (batch["lengths"], batch["parents"]) == ((3, 5), ())  # two paths, and two tokens to fill up


def test_a_plan_decides_as_a_run_does() -> None:
    config = tiny_config("cohere2", 300)
    recipe = load_recipe(None, {"method": "lora"})
    planned = blocks_of(meta_model(config, recipe, torch.float32))  # the first to ask decides for all
    assert planned.flattened
    assert planned == swap_blocks(AutoModelForCausalLM.from_config(config))
    bare = bare_model(config, recipe, torch.float32)
    one = with_layers(bare, decoder_layers(bare), (0,))
    cut = blocks_of(meta_model(config, recipe, torch.float32, one))
    assert cut.blocks.keys() == planned.blocks.keys()


def test_what_stays_transformers_own_is_named() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("bloom", 300))
    assert "rows are padded" in str(swap_blocks(model).reason)
    model = AutoModelForCausalLM.from_config(tiny_config("starcoder2", 300))
    assert "mlp Starcoder2MLP" in str(swap_blocks(model).reason)


def test_two_adapters_and_dora_take_peft_s_own_path() -> None:
    stock = build("llama")
    ours = ours_of(stock)
    both = []
    for model in (stock, ours):
        torch.manual_seed(1)
        from peft import LoraConfig, get_peft_model

        from nybble.models.lora_linear import use_our_layer

        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
        if model is ours:
            use_our_layer(config)
        both.append(get_peft_model(model, config).train())
    loss, expected = gradients(both[0], PadBatch(0)([rows()]))
    got, found = gradients(both[1], FlatBatch()([rows()]))
    assert got == pytest.approx(loss, rel=1e-6)
    shared = {name: grad for name, grad in expected.items() if float(grad.norm()) > 0}
    assert largest_relative(shared, {name: found[name] for name in shared}) < 1e-5


def test_dropout_changes_with_the_micro_step_and_not_with_evaluation() -> None:
    from nybble.models.lora_linear import share_seeds
    from nybble.nn.dropout_seed import DropoutSeeds

    ours = adapt(ours_of(build("llama")), lora_dropout=0.5)
    seeds = DropoutSeeds(seed=1, micro_step=0)
    share_seeds(ours, seeds)
    batch = FlatBatch()([rows()])

    def loss() -> float:
        return ours(**batch).loss.item()

    first, again = loss(), loss()
    seeds.micro_step = 1
    assert first == again != loss()
    ours.eval()
    quiet = loss()
    seeds.micro_step = 2
    assert quiet == loss()


def answers(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the logits that they come from."""
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with torch.no_grad():
        made = model.eval().generate(
            input_ids=ids, attention_mask=mask, **settings, return_dict_in_generate=True, output_logits=True
        )
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("rows_padded", [0, 1], ids=["even", "padded"])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_answers_are_those_of_transformers_and_peft(
    family: str, n_rows: int, rows_padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    pack(model)
    ours, theirs = adapt(ours_of(model)), adapt(model)
    ids = torch.randint(3, 300, (n_rows, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : 2 * rows_padded] = 0
    steps = []
    monkeypatch.setattr("nybble.models.blocks.attention.attend_cached", lambda *a: steps.append(1) or attend_cached(*a))
    tokens, logits = answers(ours, ids, mask)
    expected_tokens, expected = answers(theirs, ids, mask)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    if "sliding_window" not in EXTRAS[family]:  # what hides tokens takes transformers' way
        assert len(steps) == (0 if rows_padded else 19 * SIZES["num_hidden_layers"])
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(answers(ours, ids, mask)[0], answers(theirs, ids, mask)[0])


@pytest.mark.parametrize(
    "family", ["gpt_oss", "granite", "nemotron", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "vaultgemma"]
)
def test_other_families_answer_as_transformers_does(family: str) -> None:
    config = tiny_config(family, 300)
    config.eos_token_id = None
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation=choice_for(config)).float()
    move(theirs)
    ours = ours_of(theirs)
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(1))
    for hidden in (0, 2):
        mask = torch.ones_like(ids)
        mask[0, :hidden] = 0
        (tokens, logits), (expected_tokens, expected) = answers(ours, ids, mask), answers(theirs, ids, mask)
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
