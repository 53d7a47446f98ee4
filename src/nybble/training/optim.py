"""Optimizers and schedules by their transformers names.

transformers offers no function from a name to an optimizer but `Trainer.get_optimizer_cls_and_kwargs`, which wants
TrainingArguments; both are used here and nowhere else.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from typing import Any

import torch
from torch import nn

from nybble.errors import CannotRunError, RecipeError
from nybble.guard import brief
from nybble.hardware import Device
from nybble.recipe import TrainingSection

# Optimizer names that need a library of their own: word in the name -> (module, how to install it).
_LIBRARIES = {
    "paged": ("bitsandbytes", 'pip install "nybble[bnb]"'),
    "bnb": ("bitsandbytes", 'pip install "nybble[bnb]"'),
    "8bit": ("bitsandbytes", 'pip install "nybble[bnb]"'),
    "ademamix": ("bitsandbytes", 'pip install "nybble[bnb]"'),
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "schedule_free": ("schedulefree", "pip install schedulefree"),
    "torch_4bit": ("torchao", "pip install torchao"),
    "torch_8bit": ("torchao", "pip install torchao"),
}
_IN_BACKWARD = ("lomo", "adalomo")  # they update weights within the backward pass, before a step can be judged
_WITHOUT_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_LORA_B = re.compile(r"\.lora_(embedding_)?B\b")
_OWN_GROUPS = ("galore", "apollo")  # words in the names of optimizers that group the parameters themselves
# They follow the loss of regular evaluations, which the loop does not give them.
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # transformers would drop them unsaid


def check_optimizer_and_schedule(section: TrainingSection) -> None:
    """Refuse names that do not exist or cannot be used, before anything is loaded.

    Raises:
        RecipeError: an optimizer or schedule that does not exist, or one that this loop cannot run.
        CannotRunError: the optimizer's library is not installed.
    """
    _check_name("optim", section.optim, optimizer_names())
    _check_name("lr_scheduler_type", section.lr_scheduler_type, schedule_names())
    _check_schedule(section)
    if section.loraplus_lr_ratio is not None and any(word in section.optim for word in _OWN_GROUPS):
        raise RecipeError(
            f"loraplus_lr_ratio: optim {section.optim} groups the parameters itself; choose another optim, e.g. "
            "adamw_torch_fused"
        )
    for word in sorted(_LIBRARIES, key=len, reverse=True):
        module, command = _LIBRARIES[word]
        if word in section.optim:
            if importlib.util.find_spec(module) is None:
                raise CannotRunError(f"optim {section.optim} needs {module}, which is not installed; {command}")
            break


def optimizer_names() -> list[str]:
    """The optimizers of transformers that can be used here, if their library is installed."""
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames if name.value not in _IN_BACKWARD]


def schedule_names() -> list[str]:
    """The learning rate schedules of transformers that can be used here."""
    from transformers.trainer_utils import SchedulerType

    return [name.value for name in SchedulerType if name.value not in _BY_METRIC]


def create_optimizer(model: nn.Module, section: TrainingSection, device: Device) -> Any:
    """The optimizer that `section.optim` names, over the trained parameters of `model`."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=section.output_dir,
        optim=section.optim,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        optim_args=section.optim_args,
        warmup_steps=section.warmup_ratio if section.warmup_steps is None else section.warmup_steps,
        use_cpu=device.type == "cpu",
        report_to="none",
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        return kind()(model, **settings)  # a factory, which groups the parameters itself
    own = [settings.pop(name) for name in ("params", "model", "optimizer_dict") if name in settings]
    optimizer = kind(own[-1] if own else parameter_groups(model, section), **settings)
    if "bitsandbytes" in kind.__module__ and settings.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def parameter_groups(model: nn.Module, section: TrainingSection) -> list[dict[str, Any]]:
    """The trained parameters, those of norms and the biases without weight decay.

    Under LoRA+ (Hayou et al. 2024) the adapters' B are a group of their own, with a rate of its own.
    """
    ratio = section.loraplus_lr_ratio
    in_norms = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    faster: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = name not in in_norms and not _WITHOUT_DECAY.search(name.lower())
            is_faster = ratio is not None and _LORA_B.search(name)
            (faster if is_faster else decayed if is_decayed else others).append(parameter)
    decay = section.weight_decay
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if ratio is not None and not isinstance(section.learning_rate, str):
        groups.append({"params": faster, "weight_decay": decay, "lr": section.learning_rate * ratio})
    return groups


def create_schedule(optimizer: Any, section: TrainingSection, max_steps: int) -> Any:
    """The learning-rate schedule that `section.lr_scheduler_type` names."""
    from transformers import get_scheduler

    warmup = section.warmup_ratio if section.warmup_steps is None else section.warmup_steps
    return get_scheduler(
        section.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=math.ceil(max_steps * warmup) if warmup < 1 else math.ceil(warmup),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=dict(section.lr_scheduler_kwargs),
    )


def learning_rate_of(optimizer: Any) -> float:
    """The rate of the next update."""
    return float(optimizer.param_groups[0]["lr"])


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _check_schedule(section: TrainingSection) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    fault = "it has no arguments" if section.lr_scheduler_type in _WITHOUT_ARGUMENTS else ""
    fault = fault if section.lr_scheduler_kwargs else ""
    try:
        create_schedule(torch.optim.SGD([parameter], lr=1.0), section, max_steps=100)
    except (TypeError, ValueError) as error:
        fault = brief(error)
    if fault:
        raise RecipeError(
            f"training.lr_scheduler_kwargs: {section.lr_scheduler_type} does not take {section.lr_scheduler_kwargs} "
            f"({fault}); see transformers' schedule of that name for its arguments"
        )


def _check_name(setting: str, value: str, allowed: list[str]) -> None:
    if value in _IN_BACKWARD:
        raise RecipeError(
            f"training.{setting}: {value} updates weights within the backward pass, where no step can be judged, "
            "clipped or accumulated; choose another, e.g. adamw_torch_fused"
        )
    if value in _BY_METRIC:
        raise RecipeError(
            f"training.{setting}: {value} follows the loss of regular evaluations, which are not given to it; "
            "choose another, e.g. cosine"
        )
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
        raise RecipeError(f"training.{setting}: unknown {value!r}; {hint}")
