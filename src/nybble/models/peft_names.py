"""PEFT's renaming of targets in families with stacked experts: kept out of memory, and met in the files.

Of families whose experts were linears in transformers 4, PEFT takes each target that is called like one of those for a
parameter of the stacked experts, and linears of that name (the MLPs of dense layers, shared experts) lose their
adapter. In memory it is kept from that. A file must survive it, since stock PEFT does it on loading: there such linears
are named by their weight, as PEFT's `target_parameters`. A parameter's adapter has the same tensors under the same
names and adds the same sum; it knows no dropout, which is over when a file is read, and no DoRA.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nybble.models.skeleton import base_of, is_conv1d


@contextmanager
def targets_as_told(model: Any) -> Iterator[None]:
    """Within, PEFT puts adapters on the modules that it is told, and reads tensors by the names that they have.

    Tensors are renamed on reading, too: twice where transformers' pattern finds the new name again (Laguna's shared
    experts).
    """
    config = model.config
    own = "model_type" in vars(config)
    before = config.model_type
    config.model_type = ""  # by which PEFT knows the family
    try:
        with warnings.catch_warnings():
            # Patterns that match nothing are refused by us; PEFT warns of those that match stacks of experts.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            yield
    finally:
        if own:
            config.model_type = before
        else:
            del config.model_type


def config_text(model: Any) -> str:
    """The text of `adapter_config.json`, with which stock PEFT puts the adapter where it is in `model`."""
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True, **_for_stock_peft(model)}
    return json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}, indent=2, sort_keys=True)


def _for_stock_peft(model: Any) -> dict[str, Any]:
    """Settings of the file that differ from those in memory."""
    from peft.tuners import lora

    base, config = base_of(model), model.peft_config["default"]
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, lora.LoraLayer) and not isinstance(module, lora.ParamWrapper)
    }
    # GPT-2's layers are linears with transposed weights, which PEFT wants to be told.
    stored = [layer.get_base_layer() for layer in layers.values()]
    changes: dict[str, Any] = {
        "fan_in_fan_out": any(is_conv1d(m) or getattr(m, "stored_transposed", False) for m in stored)
    }
    has_towers = hasattr(base, "nybble_places")
    if has_towers:
        # PEFT shortens a long list of names to ends, which modules of the towers may have, too.
        changes["target_modules"] = sorted(layers)
    if config.use_dora:
        return changes
    targets = layers if has_towers or isinstance(config.target_modules, str) else config.target_modules
    kept = _converted(base, set(targets)).target_modules
    lost = [name for name in layers if not any(name == end or name.endswith(f".{end}") for end in kept)]
    if not lost:
        return changes
    adapter = {name: layers[name].r["default"] for name in lost}
    alphas = {name: layers[name].lora_alpha["default"] for name in lost}
    return {
        **changes,
        "target_modules": kept,
        "target_parameters": sorted({*(config.target_parameters or ()), *(f"{name}.weight" for name in lost)}),
        "lora_dropout": 0.0,
        "rank_pattern": {**config.rank_pattern, **_others(adapter, config.r)},
        "alpha_pattern": {**config.alpha_pattern, **_others(alphas, config.lora_alpha)},
    }


def _others(values: dict[str, Any], common: Any) -> dict[str, Any]:
    """PEFT's patterns for the weights whose value is not the common one."""
    return {f"{name}.weight": value for name, value in values.items() if value != common}


def _converted(model: Any, targets: set[str]) -> Any:
    """PEFT's config of `targets` as PEFT changes it for `model`."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=targets)
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it wants gate and up projections together, or none
        both = {"w1", "w3", "gate_proj", "up_proj"}
        return _converted(model, {name for name in targets if name.rpartition(".")[2] not in both})
    return config
