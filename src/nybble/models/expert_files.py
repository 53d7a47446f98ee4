"""Where a checkpoint holds the weights of experts: a stack whole, or one tensor for each expert and part."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nybble.models.experts import expert_stacks


@dataclass(frozen=True)
class StoredExperts:
    """A tensor of a checkpoint that holds weights of experts."""

    stack: str  # its name in the model
    expert: int | None = None  # None: of all experts
    part: int = 0
    is_of_family: bool = True  # whether the family's own checkpoints have such tensors


def stored_experts(model: Any, keys: Collection[str]) -> dict[str, StoredExperts]:
    """Those of `keys`, names in a checkpoint of `model`, that hold experts whose layout is known.

    `model` is bare, as transformers builds it, and may be without weights.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    stacks, tensors = expert_stacks(model), model.state_dict(keep_vars=True)
    if not stacks:
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found: dict[str, StoredExperts] = {}
    for key in keys:
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if source is None and name in stacks:
            found[key] = StoredExperts(name)
        elif source is not None and "*." in source and name in stacks:
            sources = next(c.source_patterns for c in converters if source in c.source_patterns)
            number = re.search(r"\.(\d+)\." + re.escape(source.replace("\\", "").rpartition("*.")[2]), key)
            if number:
                found[key] = StoredExperts(name, int(number[1]), sources.index(source))
        elif source is None:
            of_ours = re.fullmatch(r"(.+)\.(\d+)\.(\w+)\.weight", name)
            for stack, shape in stacks.items() if of_ours else ():
                if of_ours and stack.rpartition(".")[0] == of_ours[1] and of_ours[3] in shape.parts:
                    part = shape.parts.index(of_ours[3])
                    found[key] = StoredExperts(stack, int(of_ours[2]), part, is_of_family=False)
    return found


def name_of_stack(model: Any, stack: str) -> str:
    """The name that a stack has in the checkpoints of a family that stores it whole."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]
    back = [t.reverse_transform() for t in reversed(renamings) if not isinstance(t, PrefixChange)]
    for renaming in back:
        stack, _ = renaming.rename_source_key(stack)
    return stack
