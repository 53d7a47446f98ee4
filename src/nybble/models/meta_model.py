"""The model that a recipe trains, on torch's meta device: every module, shape and type of it, and no memory.

A process that receives its weights from another one starts from it, and a plan traces it. `materialize` then gives it
tensors: real ones, or fake ones under torch's fake mode.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nybble.models.adapters import attach
from nybble.models.blocks import implementation_of, swap_blocks
from nybble.models.experts import experts_to_pack, packed_experts, swap_experts
from nybble.models.skeleton import linears_to_pack, model_without_weights, swap_linears
from nybble.models.vocabulary import NewTokens
from nybble.nn import Linear4bit
from nybble.quant import PackedWeight
from nybble.quant.packed import NESTED_BLOCK_SIZE
from nybble.recipe import QuantizationSection, Recipe


def bare_model(config: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """The base of `recipe` as transformers builds it, on the meta device, before anything is packed or replaced."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # of a folder in 4 bits: `meta_model` packs by itself
    return model_without_weights(
        config,
        dtype=torch.float32 if recipe.method == "full" else dtype,
        attn_implementation=implementation_of(recipe.model, config),
        trust_remote_code=recipe.model.trust_remote_code,
    )


def meta_model(config: Any, recipe: Recipe, dtype: torch.dtype, bare: Any = None) -> Any:
    """The model of `recipe` as loading and attaching make it, on the meta device.

    The rows of new tokens are added to those of the config. It must not be called under a fake mode. `bare` is what
    `bare_model` made, with fewer layers perhaps; it is changed. Raises what transformers or PEFT raise for a config
    that they cannot build.
    """
    model = bare_model(config, recipe, dtype) if bare is None else bare
    with torch.device("meta"):
        if recipe.method == "qlora":
            _pack(model, recipe.quantization, dtype)
        model.eval()
        swap_blocks(model, recipe.model.attn_implementation)
        if recipe.method != "full":
            first, n = config.get_text_config().vocab_size, len(recipe.lora.new_tokens)
            model = attach(model, recipe.lora, "planned", tokens=NewTokens(tuple(range(first, first + n)), first))
    return model


def materialize(model: nn.Module) -> None:
    """Give every tensor of a model on the meta device memory filled with zeros; a shared tensor gets it once."""
    filled: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in filled:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                filled[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
            setattr(module, name, filled[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, filled.setdefault(id(buffer), torch.zeros(buffer.shape, dtype=buffer.dtype)))


def _pack(model: Any, section: QuantizationSection, dtype: torch.dtype) -> None:
    """Swap what loading packs, and give each linear and expert a packed weight of the right shape."""
    names, _left = linears_to_pack(model, section.skip_modules)
    swap_linears(model, names, dtype)
    for name in names:
        layer: Linear4bit = model.get_submodule(name)
        layer.set_packed(_packed_like((layer.out_features, layer.in_features), section, dtype))
    experts, _left = experts_to_pack(model, section.skip_modules)
    swap_experts(model, experts, dtype)
    for module in packed_experts(model).values():
        for projection, stack in module.stacks.items():
            # The first makes room for all, and what it holds does not matter.
            module.set_packed(projection, 0, 0, _packed_like(stack.part_shape, section, dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _packed_like(shape: tuple[int, int], section: QuantizationSection, dtype: torch.dtype) -> PackedWeight:
    n_elements = shape[0] * shape[1]
    n_blocks = -(-n_elements // section.bnb_4bit_blocksize)
    is_nested = section.bnb_4bit_use_double_quant
    codes = torch.zeros(-(-n_elements // 2), 1, dtype=torch.uint8)
    scales = torch.zeros(n_blocks, dtype=torch.uint8) if is_nested else torch.ones(n_blocks)
    nested = (torch.ones(-(-n_blocks // NESTED_BLOCK_SIZE)), torch.zeros(())) if is_nested else ()
    return PackedWeight(codes, scales, shape, section.bnb_4bit_blocksize, "nf4", dtype, *nested)
