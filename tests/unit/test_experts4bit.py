"""Experts in 4 bits by themselves: the backward pass by hand, what is stored, and what is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from nybble.models import materialize
from nybble.models.experts import experts_to_pack, pack_stack, stacks_of, swap_experts, unpacked_experts
from nybble.nn import Experts4bit
from nybble.nn.lora_projection import Adapter
from nybble.nn.workspace import workspace
from nybble.planning.memory_tracer import MemoryTracer
from nybble.planning.traced_step import reusing
from nybble.quant import encode

N, HIDDEN, INNER, R, TOKENS, K = 3, 8, 6, 2, 5, 2


def original(kind: type[nn.Module] = MixtralExperts, dtype: torch.dtype = torch.float32) -> Any:
    """A family's own module with random weights."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "moe_latent_size": None}
    family = {GptOssExperts: "gpt_oss", NemotronHExperts: "nemotron_h", MuseSparkExperts: "muse_spark_text"}
    config = AutoConfig.for_model(family.get(kind, "mixtral"), num_hidden_layers=2)
    for name, value in {**dict.fromkeys(names, N), **sizes, "moe_hidden_size": HIDDEN}.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    module = kind(config).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()
    return module


def packed(module: Any, dtype: torch.dtype = torch.float32, double_quant: bool = True) -> Experts4bit:
    """The module in 4 bits, as loading packs it."""
    holder = nn.ModuleDict({"experts": copy.deepcopy(module)})
    stacks = {name: getattr(module, name).float() for name in stacks_of(module) or {}}
    swap_experts(holder, ["experts"], dtype)
    experts = holder["experts"]
    assert isinstance(experts, Experts4bit)
    for name, stack in stacks.items():
        setattr(experts, name, pack_stack(experts, name, stack, lambda w: encode(w, double_quant=double_quant)))
    return experts


def routing(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Expert 1 gets no token, and one choice lies beyond the experts."""
    index = torch.tensor([[0, 2], [2, 0], [2, N], [0, 2], [2, 0]])
    return index, torch.rand(TOKENS, K, dtype=dtype)


def adapters(experts: Experts4bit, dtype: torch.dtype) -> dict[str, Adapter]:
    made = {}
    for name, stack in experts.stacks.items():
        a, b = (torch.randn(*s, dtype=dtype) for s in ((N * R, stack.in_features), (stack.out_features, N * R)))
        made[name] = Adapter(a.requires_grad_(), b.requires_grad_(), 1.7, 0.0, 0)
    return made


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts, NemotronHExperts])
def test_the_backward_pass_agrees_with_finite_differences(kind: type[nn.Module]) -> None:
    experts = packed(original(kind, torch.float64), torch.float64)
    index, weights = routing(torch.float64)
    low_rank = adapters(experts, torch.float64)
    masters = [tensor for adapter in low_rank.values() for tensor in (adapter.a, adapter.b)]

    def run(x: Tensor, w: Tensor, *_masters: Tensor) -> Tensor:
        return experts(x, index, w, adapters=low_rank)

    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weights.requires_grad_(), *masters))


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts, NemotronHExperts])
@pytest.mark.parametrize("gradients", [True, False])
def test_experts_compute_what_the_family_computes_with_the_decoded_weights(
    kind: type[nn.Module], gradients: bool
) -> None:
    module = original(kind)
    experts = packed(module)
    for name in experts.stacks:
        getattr(module, name).copy_(experts.dequantize(name, torch.float32))
    index, weights = routing()
    index[2, 1], weights[2, 1] = 0, 0.0  # transformers' own loop for gpt-oss takes no number beyond the experts
    x = torch.randn(TOKENS, HIDDEN, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(experts(x, index, weights), module(x, index, weights), rtol=1e-5, atol=1e-5)


def test_a_few_tokens_are_multiplied_without_decoding_and_give_the_same() -> None:
    experts = packed(original())
    index, weights = routing()
    low_rank = adapters(experts, torch.float32)
    x = torch.randn(TOKENS, HIDDEN)
    with torch.enable_grad():
        whole = experts(x.requires_grad_(), index, weights, adapters=low_rank).detach()
    workspace.clear()
    with torch.no_grad():
        rows = [experts(x[i : i + 1], index[i : i + 1], weights[i : i + 1], adapters=low_rank) for i in range(TOKENS)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-5, atol=1e-5)
    assert not workspace.pieces()


def test_only_the_input_and_the_routing_are_kept() -> None:
    experts = packed(original(), torch.bfloat16)
    index, weights = routing()
    kept: list[Tensor] = []
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, index, weights, adapters=adapters(experts, torch.float32))
    assert {tuple(t.shape) for t in kept} == {(TOKENS, HIDDEN), (TOKENS, K)}


def test_no_block_crosses_an_expert() -> None:
    """A block would: 6 x 8 weights a part are no multiple of 64."""
    module = original()
    experts = packed(module, double_quant=False)
    for expert in range(N):
        gate = module.gate_up_proj[expert, :INNER]
        want = encode(gate.contiguous(), double_quant=False)
        assert torch.equal(experts.packed("gate_up_proj", expert, 0).packed, want.packed)
        assert torch.equal(experts.packed("gate_up_proj", expert, 0).absmax, want.absmax)
    assert experts.n_packed == 3 * N
    assert experts.n_elements == N * 3 * INNER * HIDDEN
    assert experts.n_bytes == N * 3 * (INNER * HIDDEN // 2 + 4)


def test_a_state_dict_has_one_weight_for_each_expert_and_part_and_loads_again() -> None:
    experts = packed(original(GptOssExperts))
    state = experts.state_dict()
    assert {f"{e}.{name}.weight" for e in range(N) for name in ("gate_up_proj", "down_proj")} <= set(state)
    assert {"gate_up_proj_bias", "down_proj_bias", "2.down_proj.weight.absmax"} <= set(state)
    twin = packed(original(GptOssExperts))
    twin.load_state_dict(state)
    for name in experts.stacks:
        assert torch.equal(twin.dequantize(name), experts.dequantize(name))
    del state["1.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"1\.down_proj\.weight"):
        twin.load_state_dict(state)


def test_moving_never_rounds_the_scales() -> None:
    experts = packed(original())
    before = experts.dequantize("down_proj", torch.float32)
    experts.to(torch.bfloat16)
    assert torch.equal(experts.dequantize("down_proj", torch.float32), before)


def test_weights_that_do_not_fit_are_refused() -> None:
    experts = packed(original())
    with pytest.raises(ValueError, match="does not fit the experts' \\(6, 8\\)"):
        experts.set_packed("gate_up_proj", 0, 0, encode(torch.ones(8, 8)))
    with pytest.raises(ValueError, match="fp4 in blocks of 64 among others"):
        experts.set_packed("gate_up_proj", 0, 0, encode(torch.ones(6, 8), "fp4"))
    with pytest.raises(ValueError, match="scales of another format"):
        experts.set_packed("gate_up_proj", 0, 0, encode(torch.ones(6, 8), double_quant=False))
    with pytest.raises(ValueError, match="does not fit the experts' \\(3, 12, 8\\)"):
        pack_stack(experts, "gate_up_proj", torch.ones(3, 8, 13), encode)


def test_a_traced_step_stands_for_the_work_of_all_experts() -> None:
    """Every token to the same k experts: k products of all rows, and every expert decoded."""

    def cost(mode: Any) -> MemoryTracer:
        experts = packed(original(), torch.bfloat16)
        with mode, reusing():
            materialize(experts)
            index, x = torch.zeros(200, K, dtype=torch.long), torch.zeros(200, HIDDEN, requires_grad=True)
            index[:, 1] = 1
            live = MemoryTracer()
            with live:
                live.start("all")
                experts(x, index, torch.ones(200, K)).sum().backward()
        return live

    traced, real = cost(FakeTensorMode()), cost(nullcontext())
    assert traced.flops == real.flops
    assert traced.peaks["all"].total_bytes == pytest.approx(real.peaks["all"].total_bytes, rel=0.01)


class Unknown(nn.Module):
    """Experts that no flag of transformers describes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(N, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.ones(N, HIDDEN, INNER))


def test_experts_of_an_unknown_layout_stay_as_they_are_and_are_named() -> None:
    model = nn.ModuleDict({"a": original(), "b": Unknown(), "c": original(MuseSparkExperts), "d": nn.Conv1d(4, 4, 2)})
    assert experts_to_pack(model, ()) == (["a"], ["b", "c"])
    assert experts_to_pack(model, ["a"]) == ([], ["a", "b", "c"])
    n = 3 * N * INNER * HIDDEN
    assert unpacked_experts(model) == [f"{3 * n:,} weights of experts stay in 16 bits: a (MixtralExperts) and 2 more"]
    with pytest.raises(ValueError, match="b is no module of experts"):
        swap_experts(model, ["b"], torch.float32)
