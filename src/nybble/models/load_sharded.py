"""Loading a model that no process holds whole: the first process reads it, and the others receive their shards."""

from __future__ import annotations

from typing import Any

import torch

from nybble.errors import RecipeError
from nybble.hardware import Device
from nybble.models.adapters import attach
from nybble.models.continued import start_from
from nybble.models.load import LoadReport, load_model
from nybble.models.meta_model import meta_model
from nybble.models.sharding import shard, shards_among
from nybble.models.skeleton import compute_dtype
from nybble.models.source import ModelSource
from nybble.nn import Linear4bit
from nybble.recipe import QuantizationSection, Recipe
from nybble.run.processes import Processes

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # those that work on shards


def for_shards(recipe: Recipe) -> Recipe:
    """The recipe as a model in shards can be trained: without the memory savers that a plan might choose.

    Raises:
        RecipeError: it asks for something that does not work in shards.
    """
    training, lora = recipe.training, recipe.lora
    if recipe.method == "qlora" and recipe.quantization.encoder == "calibrated":
        raise RecipeError(
            "distributed: fsdp does not work with encoder: calibrated; calibrate first, with nybble quantize --encoder "
            "calibrated, and train on the folder that it writes"
        )
    refused = {
        "method: full": recipe.method == "full",
        f"init_lora_weights: {lora.init_lora_weights}": lora.init_lora_weights != "default",
        "use_dora": lora.use_dora,
        "new_tokens": bool(lora.new_tokens),
        "modules_to_save": bool(lora.modules_to_save),
        "lean: always": training.lean == "always",
        "parity_steps": bool(training.parity_steps),
        f"optim: {training.optim} (but {', '.join(_OPTIMIZERS)} do)": training.optim not in _OPTIMIZERS,
    }
    for setting, is_asked_for in refused.items():
        if is_asked_for:
            raise RecipeError(f"distributed: fsdp does not work with {setting}; remove it, or use distributed: ddp")
    return recipe.model_copy(update={"training": training.model_copy(update={"lean": "never"})})


def load_in_shards(
    source: ModelSource, recipe: Recipe, device: Device, base_name: str, processes: Processes
) -> tuple[Any, torch.dtype, LoadReport]:
    """The model of `recipe` with fresh adapters, in shards on each process's `device`, with its compute type.

    Raises:
        InputError: as `load_model`, in all processes alike.
    """
    dtype, _ = compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, device)
    model = None
    description = None
    with processes.together():
        if processes.is_main:
            model, report = load_model(source, recipe.method, recipe.model, recipe.quantization, device, on_host=True)
            description = (report, _packing_of(model, recipe.quantization, report))
            torch.manual_seed(recipe.training.seed)  # of the adapters' first values
            model = attach(model, recipe.lora, base_name)
            if recipe.lora.adapter_name_or_path:
                start_from(model, recipe.lora.adapter_name_or_path)
    report, packing = processes.gather(description)[0]
    if model is None:
        model = meta_model(source.config, recipe.model_copy(update={"quantization": packing}), dtype)
    n_shards = shards_among(recipe.training, processes.count)
    shard(model, processes, device.torch_device, n_shards=n_shards, offload=recipe.training.fsdp_cpu_offload)
    return model, dtype, report


def _packing_of(model: torch.nn.Module, section: QuantizationSection, report: LoadReport) -> QuantizationSection:
    """The settings by which the base is packed; a folder that is stored in 4 bits decides them itself."""
    packed = next((m.packed for m in model.modules() if isinstance(m, Linear4bit)), None)
    if packed is None:
        return section
    return section.model_copy(
        update={
            "bnb_4bit_quant_type": packed.quant_type,
            "bnb_4bit_use_double_quant": packed.is_nested,
            "bnb_4bit_blocksize": packed.block_size,
            "skip_modules": report.left_in_16bit,
        }
    )
