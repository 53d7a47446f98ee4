"""What a causal language model is made of, as every part of Nybble understands it.

One definition of each: the model below its adapters, its decoder layers, the layers whose activations can be
recomputed, the linears that are packed to 4 bits, the type that it computes in, and the model without weights (on
torch's meta device). Loading, the quantizer, calibration, sharding, training and planning all ask here, so that a plan
describes the model that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from nybble.models.text_part import is_multimodal, text_class, text_config
from nybble.nn import Linear4bit


class ComputeDevice(Protocol):
    """The facts about a device that decide the compute type: a `Device` that is here, or a `Profile` of another."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def backend(self) -> str:
        """`cpu`, `cuda` or `hip`."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether its bfloat16 is worth using."""


def compute_dtype(wanted: str, device: ComputeDevice) -> tuple[torch.dtype, list[str]]:
    """The type to compute in, and a note if it is not the wanted one.

    float16 products are about ten times slower than bfloat16 ones on a CPU, and lose range without any gain.
    """
    if wanted == "float16" and device.backend == "cpu":
        return torch.bfloat16, ["float16 is slow on a CPU: computing in bfloat16 instead"]
    if wanted == "bfloat16" and not device.has_bfloat16:
        return torch.float16, [f"{device.name} has no bfloat16: computing in float16 instead"]
    return getattr(torch, wanted), []


def base_of(model: Any) -> Any:
    """The model below its adapters, or `model` itself where it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of `model`, bare or with adapters, in order; empty where it keeps no list of them.

    They are the first `ModuleList` with as many entries as the config counts hidden layers.
    """
    base = base_of(model)
    config = getattr(base, "config", None)
    if config is None:
        return []
    n_layers = config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    return []


def embeddings_and_head(model: Any) -> tuple[str, str]:
    """The names of the input embeddings and of the output head in a bare model; empty where it has none."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    first, last = (names.get(id(module), "") for module in ends)
    return first, last


def recomputable_layers(model: Any) -> list[nn.Module]:
    """The decoder layers whose activations can be recomputed in the backward pass, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in decoder_layers(model) if isinstance(layer, GradientCheckpointingLayer)]


def set_recomputed(layers: Sequence[nn.Module], depth: int) -> None:
    """Let the first `depth` of `layers` be recomputed in the backward pass, and no others."""
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < depth  # type: ignore[assignment]


def recompute_by(layers: Sequence[nn.Module], function: Callable[..., Any]) -> None:
    """Let `function` run those of `layers` that are recomputed, called with the layer's forward and its arguments."""
    for layer in layers:
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]


def linears_to_pack(model: Any, skip_modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the linears of a bare model that are packed to 4 bits, and of those that are left as they are.

    Left are the output head, weights tied to it, what transformers keeps in float32, and `skip_modules`.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep_fp32 = getattr(model, "_keep_in_fp32_modules", None)
    skip = HfQuantizer.get_modules_to_not_convert(model, list(skip_modules), keep_fp32, add_default_skips=True)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    packed = [name for name in names if should_convert_module(name, skip)]
    return packed, [name for name in names if name not in set(packed)]


def swap_linears(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Put an empty `Linear4bit` that computes in `dtype` in the place of each named linear."""
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        model.set_submodule(name, layer)


def model_without_weights(config: Any, **settings: Any) -> Any:
    """The causal language model that transformers builds of `config`, on the meta device.

    Of a multimodal config that is its text model. `settings` go to transformers' `from_config`. Raises what
    transformers raises for a config that it cannot build.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        if is_multimodal(config):
            settings.pop("trust_remote_code", None)
            return text_class(config)._from_config(text_config(config), **settings)
        return AutoModelForCausalLM.from_config(config, **settings)
