"""What a multimodal folder holds beside its text model: written along, so that the result is the whole architecture.

Towers are copied byte for byte, one tensor at a time; config and processors are the base's own. So what served the base
serves the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nybble.errors import ModelError
from nybble.guard import read_object
from nybble.models.folder_checks import StoredTensor, read_header, weight_files
from nybble.models.skeleton import model_without_weights
from nybble.models.source import ModelSource
from nybble.models.text_part import TextPlace, place_of, text_section
from nybble.run.directory import to_json
from nybble.storage.atomic import write_text
from nybble.storage.shards import plan_shards

SHARD_BYTES = 1_000_000_000
_INDEX = "model.safetensors.index.json"
_PROCESSORS = ("*processor*.json", "chat_template.json")


def tower_keys(config: Any, keys: Iterable[str]) -> set[str]:
    """Those of a multimodal checkpoint's `keys` that belong to no part of its text model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    place: TextPlace = place_of(config)
    model = model_without_weights(config)
    tensors = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    inside = (f"{place.decoder}.", f"{place.head}.")
    names = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)[0] for key in keys}
    return {key for key, name in names.items() if not name.startswith(inside)}


def tower_bytes(source: ModelSource) -> int:
    """The bytes that `complete` copies: 0 for a model that is nothing but text."""
    return sum(headers[key].n_bytes for _file, headers in _towers(source) for key in headers)


def complete(folder: Path, source: ModelSource, saved: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Make `folder`, which holds the weights of the text model of `source` alone, one of the whole multimodal model.

    Args:
        folder: its config is written, or replaced.
        source: the multimodal model that the text model was made of.
        saved: of the text model's own config, the data type and how it is packed.
        changes: settings of the text model that differ from those of `source`.

    Raises:
        ModelError: a file of `source` is damaged.
    """
    config = _config_of_whole(source, saved, changes)
    write_text(folder / "config.json", to_json(config, indent=2) + "\n")
    for pattern in _PROCESSORS:
        for file in source.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    _add_towers(folder, source)


def _config_of_whole(source: ModelSource, saved: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the config of the whole model, with the data type and the packing of `saved`."""
    content = read_object(source.folder / "config.json", ModelError, "download it again")
    section = content.get(_section_name(source.config), content)  # of old checkpoints it is the file itself
    for name in ("quantization_config", "torch_dtype", "_name_or_path"):
        content.pop(name, None)
    for level in (content, section):
        for name, value in changes.items():
            if name in level or (level is section and name != "tie_word_embeddings"):
                level[name] = value
        if "dtype" in saved and (level is content or "dtype" in level):
            level["dtype"] = saved["dtype"]
    if "tie_word_embeddings" in changes:  # the default of wrappers differs
        content["tie_word_embeddings"] = changes["tie_word_embeddings"]
    if packing := saved.get("quantization_config"):
        skipped = packing.get("llm_int8_skip_modules") or []
        towers = _modules_of_towers(source)
        content["quantization_config"] = {**packing, "llm_int8_skip_modules": sorted({*skipped, *towers})}
    return content


def _section_name(config: Any) -> str:
    text = text_section(config)
    return next((name for name, value in vars(config).items() if value is text), "text_config")


def _modules_of_towers(source: ModelSource) -> list[str]:
    """The modules of the multimodal class beside its text model, which no packing changes."""
    import torch

    place = place_of(source.config)
    with torch.device("meta"):
        whole = place.owner(source.config)
    names = []
    levels = [""]
    parts = (place.decoder, place.head)
    while levels:
        level = levels.pop()
        for child, _module in whole.get_submodule(level).named_children():
            name = f"{level}.{child}" if level else child
            if any(part.startswith(f"{name}.") for part in parts):
                levels.append(name)
            elif name not in parts:
                names.append(name)
    return names


def _towers(source: ModelSource) -> list[tuple[Path, dict[str, StoredTensor]]]:
    """The towers' tensors by file."""
    if not source.is_multimodal:
        return []
    headers = [(file, read_header(file)[0]) for file in weight_files(source.folder)]
    towers = tower_keys(source.config, [key for _file, tensors in headers for key in tensors])
    return [(file, {key: t for key, t in tensors.items() if key in towers}) for file, tensors in headers]


def _add_towers(folder: Path, source: ModelSource) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    places = {key: file for file, headers in _towers(source) for key in headers}
    sizes = {key: tensor.n_bytes for _file, headers in _towers(source) for key, tensor in headers.items()}
    whole = folder / "model.safetensors"
    if whole.is_file():
        whole.rename(folder / "model-text.safetensors")
    index = {key: file.name for file in sorted(folder.glob("*.safetensors")) for key in read_header(file)[0]}
    files = plan_shards("model-towers", sizes, SHARD_BYTES).files if sizes else {}
    for name, keys in files.items():
        tensors = {}
        for key in keys:
            with safe_open(places[key], framework="pt") as file:
                tensors[key] = file.get_tensor(key)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, name)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_text(folder / _INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n")
