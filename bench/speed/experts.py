"""A step of a mixture of experts: packed experts, transformers + PEFT on 16-bit experts, and experts one by one.

    python -m bench.speed.experts

A Qwen3-MoE of random weights (8 layers, hidden 1024, 32 experts of 512, 4 of them a token: 403M weights in experts),
bfloat16, LoRA of r 8 on the experts alone, one row of `--tokens` tokens, forward and backward; the three take turns in
one process. `peft` is stock PEFT's `target_parameters`, which adds every expert's adapter to its stack before the
product; `one_by_one` is a plain loop over 16-bit experts with the adapter beside the weight, under autograd. Bytes are
those of the weights and of what a layer keeps for the backward pass.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from bench.harness import Figures, Option, print_table, run, seconds


def build(asked: Namespace) -> Any:
    """The model, without its head's cost: a vocabulary of 512."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=asked.hidden, intermediate_size=asked.hidden, num_hidden_layers=asked.layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=512, num_local_experts=asked.experts,
        num_experts_per_tok=4, moe_intermediate_size=asked.hidden // 2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(0, 0.02)
    return model


def adapted(model: Any, kind: str) -> Any:
    """The model with adapters on its experts, in the way of one side."""
    import torch
    from peft import LoraConfig, get_peft_model

    from nybble.kernels import quantize
    from nybble.models.experts import expert_stacks, experts_to_pack, pack_stack, packed_experts, swap_experts
    from nybble.models.lora_linear import use_our_layer

    stacks = list(expert_stacks(model))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=stacks)
    if kind == "packed":
        whole = {name: model.get_parameter(name).detach() for name in stacks}
        swap_experts(model, experts_to_pack(model, ())[0], torch.bfloat16)
        for name, experts in packed_experts(model).items():
            for projection in experts.stacks:
                weight = whole.pop(f"{name}.{projection}")
                codes = pack_stack(experts, projection, weight, lambda w: quantize(w, encoder="absmax"))
                setattr(experts, projection, codes)
        use_our_layer(config)
    model.config.model_type = ""  # by which PEFT would rename targets
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float().normal_(0, 0.01)
    if kind == "one_by_one":
        for layer in model.get_base_model().model.layers:
            down = layer.mlp.experts
            layer.mlp.experts = _OneByOne(down.base_layer, down)
    return model.train()


def _OneByOne(inner: Any, outer: Any) -> Any:  # noqa: N802 - makes a module
    """Experts in a plain loop, the adapter beside the weight."""
    import torch
    from torch import nn

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.experts = inner, outer, outer.get_base_layer()

        def forward(self, x: Any, index: Any, weights: Any) -> Any:
            n = self.experts.num_experts
            a = [w.lora_A["default"].weight.view(n, -1, w.in_features).to(x.dtype) for w in (self.inner, self.outer)]
            b = [w.lora_B["default"].weight.view(w.out_features, -1, n).to(x.dtype) for w in (self.inner, self.outer)]
            total = torch.zeros_like(x)
            for expert in range(n):
                rows, places = torch.where(index == expert)
                if not len(rows):
                    continue
                h = x[rows]
                gate_up = h @ self.experts.gate_up_proj[expert].t() + 2 * (h @ a[0][expert].t()) @ b[0][..., expert].t()
                gate, up = gate_up.chunk(2, dim=-1)
                h = nn.functional.silu(gate) * up
                y = h @ self.experts.down_proj[expert].t() + 2 * (h @ a[1][expert].t()) @ b[1][..., expert].t()
                total = total.index_add(0, rows, (y * weights[rows, places, None]).to(x.dtype))
            return total

    return Loop()


def step(model: Any, tokens: int) -> Callable[[], None]:
    """A function that runs forward and backward over one row."""
    import torch

    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(1))

    def call() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return call


def weight_bytes(model: Any) -> int:
    """Bytes of frozen weights, scales among them."""
    tensors = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def kept_bytes(call: Callable[[], None]) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters not counted."""
    import torch

    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def measure(asked: Namespace) -> dict[str, Figures]:
    """Seconds, tokens a second and bytes of each side, and the losses, which must agree."""
    import torch

    models = {kind: adapted(build(asked), kind) for kind in ("packed", "peft", "one_by_one")}
    calls = {kind: step(model, asked.tokens) for kind, model in models.items()}
    torch.manual_seed(0)
    found = seconds(calls, asked.repeats)
    results = {
        kind: {
            **figures,
            "tokens_per_second": asked.tokens / figures["seconds"],
            "weight_bytes": float(weight_bytes(models[kind])),
            "kept_bytes": float(kept_bytes(calls[kind])),
        }
        for kind, figures in found.items()
    }
    rows = [
        (kind, f"{f['tokens_per_second']:.0f}", f"{f['weight_bytes'] / 1e6:.0f}", f"{f['kept_bytes'] / 1e6:.0f}")
        for kind, f in results.items()
    ]
    print_table("side | tokens/s | weights, MB | kept, MB", rows)
    return results


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("layers", 8, 1, help="decoder layers"),
        Option("hidden", 1024, 128, help="hidden size; an expert's is half of it"),
        Option("experts", 32, 4, help="experts of a layer"),
        Option("tokens", 512, 32, help="tokens of the row"),
        Option("repeats", 3, 1, help="counted rounds"),
    )
