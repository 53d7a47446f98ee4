"""Safetensors split into several files ("shards"), named and grouped as the Hugging Face hub does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shards:
    """Which tensors go into which file."""

    files: Mapping[str, list[str]]  # file name -> names of the tensors in it
    total_bytes: int

    def write_index(self, folder: Path) -> None:
        """Write `model.safetensors.index.json`, which tells readers the file of each tensor, if there are several."""
        if len(self.files) > 1:
            weight_map = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=1) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def plan_shards(stem: str, sizes: Mapping[str, int], largest_bytes: int) -> Shards:
    """Group tensors, in their order, into files of at most `largest_bytes`; a larger tensor gets a file of its own.

    Args:
        stem: the files are called `STEM.safetensors`, or `STEM-00001-of-00002.safetensors` and so on.
        sizes: bytes of each tensor by its name.
        largest_bytes: how large a file may be.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    split = split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda n_bytes: n_bytes,
        filename_pattern=stem.replace("{", "{{").replace("}", "}}") + "{suffix}.safetensors",
        max_shard_size=largest_bytes,
    )
    files = split.filename_to_tensors or {f"{stem}.safetensors": []}
    return Shards(files, sum(sizes.values()))
