"""A Llama-2-7B of random weights: made and packed one layer at a time, then one short forward and backward pass.

Shows that the packed linears take 4.127 bits per weight, that the host never holds the 16-bit model, and that the
parameter table is Llama-2's. About 10 minutes on two cores.
"""

from __future__ import annotations

import resource
import time
from argparse import Namespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.harness import Option, run
from bench.models import SEVEN_B_HIDDEN, VOCABULARY, seven_b
from nybble.models import attach, count_parameters
from nybble.nn import Linear4bit
from nybble.quant import encode
from nybble.recipe import LoraSection


def rss_peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(config: LlamaConfig) -> nn.Module:
    """The model with every decoder linear packed; weights N(0, 0.02), drawn in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, module.bias is not None)
            weight = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16).normal_(std=0.02)
            layer.set_packed(encode(weight))
            del weight
            model.set_submodule(name, layer)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16)
                value = value.normal_(std=0.02) if parameter.dim() > 1 else value.fill_(1.0)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    # Rotary frequencies are not in any checkpoint: they follow from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def measure(asked: Namespace) -> dict[str, Any]:
    """Build, count, run one step."""
    torch.manual_seed(0)
    config = seven_b(asked.hidden, asked.layers)
    bare = rss_peak_bytes()
    started = time.monotonic()
    model = build(config)
    build_seconds, build_peak = time.monotonic() - started, rss_peak_bytes()
    packed = [m.packed for m in model.modules() if isinstance(m, Linear4bit)]
    packed_bytes = sum(weight.n_bytes for weight in packed)
    elements = sum(weight.n_elements for weight in packed)
    adapted = attach(model, LoraSection(r=8, lora_alpha=8, target_modules=("q_proj", "v_proj")), "random")
    trainable, total = count_parameters(adapted)
    ids = torch.randint(0, VOCABULARY, (1, asked.tokens))
    started = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    result = {
        "packed_bytes": packed_bytes,
        "packed_elements": elements,
        "bits_per_weight": 8 * packed_bytes / elements,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "resident_peak_bytes_bare": bare,
        "resident_peak_bytes_built": build_peak,
        "resident_peak_bytes_step": rss_peak_bytes(),
        "build_seconds": build_seconds,
        "step_seconds": time.monotonic() - started,
        "loss": loss.item(),
        "gradients_finite": all(g is not None and bool(torch.isfinite(g).all()) for g in gradients),
    }
    for name, value in result.items():
        print(f"{name:<28} {value}")
    return result


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("tokens", 16, tiny=4, help="length of the one sequence"),
        Option("hidden", SEVEN_B_HIDDEN, tiny=256),
        Option("layers", 32, tiny=1),
    )
