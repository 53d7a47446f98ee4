"""Adapters are PEFT's: its config in, its files out.

PEFT sees a `Linear4bit` as the `nn.Linear` it is and puts its own LoRA layer around it, so every PEFT method works;
the folder that is saved loads in stock PEFT over the same base in 16 or 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nybble.errors import ModelError, RecipeError
from nybble.recipe import LoraSection


def attach(model: nn.Module, lora: LoraSection, base_name: str) -> Any:
    """`model` with fresh adapters, everything else frozen; adapters are float32.

    Raises:
        RecipeError: a target name matches no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = lora.target_modules if isinstance(lora.target_modules, str) else [*lora.target_modules]
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
        _check_targets(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        # PEFT's field is an int; a fractional alpha is legal in its arithmetic and in the file.
        lora_alpha=int(lora.lora_alpha) if float(lora.lora_alpha).is_integer() else lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """`model` with the adapter saved in `folder`, frozen.

    Raises:
        ModelError: the folder holds no adapter, or one of another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter (adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, folder)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{folder}: adapter does not fit this base: {' '.join(str(error).split())[:300]}") from error


def save_adapter(model: Any, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; embeddings are not copied in."""
    model.save_pretrained(folder, save_embedding_layers=False)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise RecipeError(
                f"lora.target_modules: {target!r} matches no linear layer; this model has {', '.join(known)}"
            )
