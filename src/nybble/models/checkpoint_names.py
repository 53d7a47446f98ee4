"""Names of tensors in a checkpoint, which may differ from those in the model that transformers builds of it.

transformers renames tensors while it loads them: a checkpoint of the bare decoder lacks the model's first name, and
families that were first published with code of their own keep the names of that code. It also has several names for a
weight that modules share, of which a checkpoint holds one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def names_in_checkpoint(model: Any, keys: Collection[str]) -> dict[str, str]:
    """The key in the checkpoint of each tensor of `model` that is stored as it is, by each of its names in the model.

    Args:
        model: bare, as transformers builds it of the checkpoint's config; without weights is enough.
        keys: the checkpoint's.

    Returns:
        Nothing for tensors that transformers puts together from several stored ones, such as stacks of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    tensors = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found: dict[str, str] = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if converter is None and name in tensors:
            found[name] = key
    by_tensor = {id(tensors[name]): key for name, key in found.items()}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_tensor} | found
