"""What a causal language model is made of, as every part of Nybble understands it.

One definition of each: the model below its adapters, its decoder layers, the layers whose activations can be
recomputed, the linears that are packed to 4 bits, the type that it computes in, and the model without weights (on
torch's meta device). Loading, the quantizer, calibration, sharding, training and planning all ask here, so that a plan
describes the model that is trained.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from nybble.models.cut_model import SkippedLayer
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

    They are the first `ModuleList` with as many entries as the config counts hidden layers; where it does not count
    them, the one that holds most parameters. Layers that a plan leaves out are not among them.
    """
    base = base_of(model)
    if getattr(base, "config", None) is None:
        return []
    n_layers = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    counted = [module for module in lists if len(module) == n_layers]
    largest = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=())
    return [layer for layer in (counted[0] if counted else largest) if not isinstance(layer, SkippedLayer)]


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


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes what `nn.Linear` does with its `weight`: also a subclass, or transformers' `Conv1D`."""
    if is_conv1d(module):
        return True
    return isinstance(module, nn.Linear) and _computes_as_linear(type(module))  # type: ignore[arg-type]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2): a linear that stores its weight as `(in, out)`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@cache
def _computes_as_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of `nn.Linear` gives the numbers of `nn.Linear`, such as Falcon's; routers give others."""
    if kind.forward in (nn.Linear.forward, Linear4bit.forward):
        return True
    probe = kind.__new__(kind)
    nn.Linear.__init__(probe, 4, 3, device="cpu")
    x = torch.linspace(-1, 1, 8, device="cpu").view(1, 2, 4)
    try:
        with torch.no_grad():
            result = probe(x)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it needs more than an input
        return False
    wanted = nn.functional.linear(x, probe.weight, probe.bias)
    return isinstance(result, Tensor) and result.shape == wanted.shape and torch.allclose(result, wanted, atol=1e-6)


def routers(model: nn.Module) -> set[str]:
    """Names of the linears that choose between experts or weigh them, by the structure of what owns experts.

    They are the owner's own linears with one output for each expert, or one for all that are shared, and all linears of
    its parts whose class is called a router or a gate.
    """
    found: set[str] = set()
    for name, owner in model.named_modules():
        counts = _expert_counts(owner)
        if not counts:
            continue
        for child_name, child in owner.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.Linear):
                found |= {full} if child.out_features in {1, *counts} or _is_router_class(child) else set()
            elif _is_router_class(child):
                found |= {f"{full}.{inner}" for inner, part in child.named_modules() if isinstance(part, nn.Linear)}
    return found


def _is_router_class(module: nn.Module) -> bool:
    return re.search(r"Router|Gating|Gate$", type(module).__name__) is not None


def _expert_counts(owner: nn.Module) -> set[int]:
    """How many experts `owner` owns: entries of a list of modules that are alike, or of its part's stacked weights."""
    counts = set()
    for part in owner.children():
        if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(entry) for entry in part}) == 1:
            counts.add(len(part))
        elif not isinstance(part, nn.Conv1d | nn.Conv2d):
            counts |= {len(weight) for weight in part.parameters(recurse=False) if weight.ndim == 3}
    return counts - {1}


def linears(model: nn.Module) -> list[str]:
    """Names of the linears of `model`, bare or packed, that can be packed and adapted, the head among them."""
    # What MultiheadAttention owns is never called: it reads the weight.
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    owners: list[tuple[str, Any]] = [(name, type(owner)) for name, owner in model.named_modules()]
    read = {f"{name}.{child}" for name, owner in owners for child in _read_by_itself(owner)}
    names = [name for name, module in model.named_modules() if is_linear(module)]
    return [name for name in names if not name.startswith(tuple(inside)) and name not in read]


@cache
def _read_by_itself(owner: Any) -> frozenset[str]:
    """Names of a class's parts by whose weights its forward multiplies itself, as Mamba's does with `dt_proj`."""
    try:
        source = inspect.getsource(inspect.unwrap(owner.forward))
    except (OSError, TypeError):  # written where no file is, or in C
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight @", source))


def linears_to_pack(model: Any, skip_modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the linears of a bare model that are packed to 4 bits, and of those that are left as they are.

    Left are the output head, weights tied to it, routers, what transformers keeps in float32, and `skip_modules`.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep_fp32 = getattr(model, "_keep_in_fp32_modules", None)
    skip = HfQuantizer.get_modules_to_not_convert(model, list(skip_modules), keep_fp32, add_default_skips=True)
    names, chooses = linears(model), routers(model)
    packed = [name for name in names if name not in chooses and should_convert_module(name, skip)]
    return packed, [name for name in names if name not in set(packed)]


def swap_linears(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Put an empty `Linear4bit` that computes in `dtype` in the place of each named linear."""
    for name in names:
        linear = model.get_submodule(name)
        shape = cast(Tensor, linear.weight).shape
        n_out, n_in = reversed(shape) if is_conv1d(linear) else shape
        layer = Linear4bit(n_in, n_out, linear.bias is not None, compute_dtype=dtype)
        layer.stored_transposed = is_conv1d(linear)
        if isinstance(linear.bias, Tensor):
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
