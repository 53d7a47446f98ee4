"""A recipe's training section as transformers' TrainingArguments."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from nybble.errors import CannotRunError, RecipeError
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


def check_training(section: TrainingSection) -> None:
    """Names that only the libraries know, checked before anything is loaded.

    Raises:
        RecipeError: an optimizer or schedule that does not exist.
        CannotRunError: a library is missing for the optimizer or a tracker.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    _check_name("optim", section.optim, [name.value for name in OptimizerNames])
    _check_name("lr_scheduler_type", section.lr_scheduler_type, [name.value for name in SchedulerType])
    for word in sorted(_LIBRARIES, key=len, reverse=True):
        module, command = _LIBRARIES[word]
        if word in section.optim:
            if importlib.util.find_spec(module) is None:
                raise CannotRunError(f"optim {section.optim} needs {module}, which is not installed; {command}")
            break
    trackers(section)


def trackers(section: TrainingSection) -> list[str]:
    """The trackers to report to, by their transformers names.

    Raises:
        CannotRunError: one is asked for by name and its library is missing.
    """
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    if section.report_to == "auto":
        return [name for name in available if name == "tensorboard"]
    wanted = [name.strip() for name in section.report_to.split(",") if name.strip() not in ("", "none")]
    for name in wanted:
        if name not in available:
            raise CannotRunError(f"report_to: {name!r} is not installed; installed: {', '.join(available) or 'none'}")
    return wanted


def training_arguments(
    section: TrainingSection, checkpoints: Path | None, device: Device, compute_dtype: torch.dtype, max_steps: int
) -> Any:
    """TrainingArguments for `section`; transformers' own bars and evaluation stay off: ours do that.

    Without a folder for `checkpoints` none are written.
    """
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=section.num_train_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=section.per_device_train_batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_scheduler_type,
        warmup_steps=section.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        max_grad_norm=section.max_grad_norm,
        optim=section.optim,
        logging_steps=section.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen
        save_strategy="steps" if checkpoints else "no",
        save_steps=section.save_steps,
        save_total_limit=section.save_total_limit,
        seed=section.seed,
        data_seed=section.seed,
        bf16=compute_dtype == torch.bfloat16,
        fp16=compute_dtype == torch.float16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        # Scales of packed weights are buffers; nothing that is frozen changes, and all that is trained has a gradient.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        report_to=[name for name in trackers(section) if name != "tensorboard"],
        run_name=section.run_name,
        disable_tqdm=True,
    )


def _check_name(setting: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
        raise RecipeError(f"training.{setting}: unknown {value!r}; {hint}")
