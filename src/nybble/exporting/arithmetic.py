"""Adds an adapter to its base, W + s B A, in float32 and one tensor at a time, into shards that transformers reads.

    LoRA      W' = W + s B A,   s = alpha / r   (rank-stabilised: alpha / sqrt(r)), which may differ between layers
    DoRA      W' = m (W + s B A) / |W + s B A|   by rows (Liu et al. 2024, arXiv 2402.09353, equation 5)

At most the tensors of one shard, in the dtype they are written in, and one float32 tensor are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.models import PREFIX, BaseWeights, read_adapter
from nybble.storage.shards import plan_shards

SHARD_BYTES = 1_000_000_000
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# Settings of PEFT's LoRA adapters that this arithmetic does not support.
_UNKNOWN = ("modules_to_save", "fan_in_fan_out", "lora_bias")


class AdapterDelta:
    """The change that a saved LoRA adapter makes to each weight. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Read the adapter's config.

        Raises:
            ModelError: there is no adapter, or its kind cannot be merged.
        """
        files = read_adapter(folder)
        settings = files.settings
        unknown = [name for name in _UNKNOWN if getattr(settings, name)] + settings.unknown
        if unknown:
            raise ModelError(
                f"{folder}: a LoRA adapter with {', '.join(unknown)[:200]} cannot be merged; LoRA, rsLoRA and DoRA can"
            )
        self.folder = folder
        self.is_dora = settings.use_dora
        self.ranks, self.scalings = files.ranks(), files.scalings()

    def __enter__(self) -> AdapterDelta:
        from safetensors import safe_open

        self._open = safe_open(self.folder / "adapter_model.safetensors", framework="pt")
        self._file = self._open.__enter__()
        self._keys = set(self._file.keys())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def modules(self) -> list[str]:
        """The names of the linear layers that it changes.

        Raises:
            ModelError: it has tensors that are not factors of linear layers.
        """
        found = set()
        for key in self._keys:
            module = next((key.removesuffix(f".{end}") for end in _FACTORS if key.endswith(f".{end}")), None)
            if module is None:
                raise ModelError(f"{self.folder}: {key} is not a factor of a linear layer and cannot be merged")
            found.add(module.removeprefix(PREFIX))
        return sorted(found)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """The stored factors A `(r, in)` and B `(out, r)` in float32."""
        a, b = (self._file.get_tensor(f"{PREFIX}{module}.{end}").float() for end in _FACTORS[:2])
        return a, b

    def apply(self, module: str, weight: Tensor) -> Tensor:
        """The merged weight, `(out, in) float32`.

        Raises:
            ModelError: the sizes of the factors do not fit the weight.
        """
        a, b = self.factors(module)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ModelError(
                f"{self.folder}: {module} is {b.shape[0]} x {a.shape[1]} in the adapter and "
                f"{' x '.join(map(str, weight.shape))} in the base: the adapter belongs to another base"
            )
        merged = torch.addmm(weight.float(), b, a, alpha=self.scalings[module])
        magnitude = f"{PREFIX}{module}.{_FACTORS[2]}"
        if magnitude in self._keys:
            length = self._file.get_tensor(magnitude).float().view(-1)
            if len(length) != len(merged):
                raise ModelError(
                    f"{self.folder}: {module} has {len(length)} magnitudes for {len(merged)} rows: damaged"
                )
            merged *= (length / merged.norm(dim=1)).unsqueeze(1)
        return merged


def merged_bytes(base: BaseWeights, dtype: torch.dtype) -> int:
    """The size of the merged tensors on disk, in bytes."""
    return sum(prod(base.shape(name)) for name in base.names()) * dtype.itemsize


def write_merged(
    base: BaseWeights,
    delta: AdapterDelta,
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the merged tensors and their index into `folder`; the caller writes configuration and tokenizer.

    Raises:
        ModelError: the adapter changes a linear layer that the base does not have, or a head tied to the embeddings.
    """
    from safetensors.torch import save_file

    targets = _targets(base, delta)
    sizes = {name: prod(base.shape(name)) * dtype.itemsize for name in base.names()}
    shards = plan_shards("model", sizes, SHARD_BYTES)
    total = len(sizes)
    done = 0
    for file, names in shards.files.items():
        shard = {}
        for name in names:
            tensor = base.read(name)
            if name in targets:
                tensor = delta.apply(targets[name], tensor)
            shard[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            done += 1
            progress(done, total)
        save_file(shard, folder / file, metadata={"format": "pt"})
    shards.write_index(folder)


def _targets(base: BaseWeights, delta: AdapterDelta) -> dict[str, str]:
    """Tensor -> module, for every tensor that the adapter changes."""
    found = {}
    for module in delta.modules():
        name = base.name_of(module)
        if name is None and module == "lm_head":
            raise ModelError(
                f"{delta.folder}: adapts lm_head, which shares its weight with the embeddings; cannot merge"
            )
        if name is None:
            raise ModelError(f"{delta.folder}: adapts {module}, which {base.source.name} does not have: another base")
        found[name] = module
    return found
