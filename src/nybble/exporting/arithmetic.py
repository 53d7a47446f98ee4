"""Adds an adapter to its base, W + s B A, in float32 and one tensor at a time, into shards that transformers reads.

    LoRA      W' = W + s B A,   s = alpha / r   (rank-stabilised: alpha / sqrt(r)), which may differ between layers
    DoRA      W' = m (W + s B A) / |W + s B A|   by rows (Liu et al. 2024, arXiv 2402.09353, equation 5)
    experts   W'_e = W_e + s B_e A_e for each expert of a stack (PEFT's `target_parameters`)
    saved     W' is in the adapter, whole (PEFT's `modules_to_save`)
    tokens    rows of W' are in the adapter (PEFT's `trainable_token_indices`); W grows where it lacks them

A head that shares its weight with the embeddings gets one of its own where the adapter changes one of the two alone, as
PEFT does. At most the tensors of one shard, in the dtype they are written in, and one float32 tensor are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.models import PREFIX, BaseWeights, StoredExperts, embeddings_and_head, read_adapter, with_mean_rows
from nybble.nn import Stack
from nybble.storage.shards import plan_shards

SHARD_BYTES = 1_000_000_000
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_ROWS = "token_adapter.trainable_tokens_delta"
# Settings of PEFT's LoRA adapters that this arithmetic does not support.
_UNKNOWN = ("lora_bias",)


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
        self.keeps_tied = settings.ensure_weight_tying
        self.rows = files.token_rows()  # module -> numbers of the rows that the adapter has
        self._names = set(files.tensors)
        self.stacks, self._stored = files.stacks, files.stored
        self._recent: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> AdapterDelta:
        from safetensors import safe_open

        self._open = safe_open(self.folder / "adapter_model.safetensors", framework="pt")
        self._file = self._open.__enter__()
        prefixed = set(self._file.keys())
        self._keys = {own: PREFIX + name if PREFIX + name in prefixed else name for own, name in self._stored.items()}
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def modules(self) -> list[str]:
        """The names of the linear layers that it adds factors to."""
        return sorted({*self.ranks} - self.stacks)

    def saved(self) -> list[str]:
        """The names of the tensors that it holds whole."""
        ends = tuple(f".{end}" for end in (*_FACTORS, _ROWS))
        return sorted(name for name in self._names if not name.endswith(ends))

    def read(self, name: str) -> Tensor:
        """A tensor of the adapter in float32."""
        tensor: Tensor = self._file.get_tensor(self._keys[name])
        return tensor.float()

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """The stored factors A `(r, in)` and B `(out, r)` in float32."""
        a, b = (self.read(f"{module}.{end}") for end in _FACTORS[:2])
        return a, b

    def apply(self, module: str, weight: Tensor, is_transposed: bool = False) -> Tensor:
        """The merged weight, `(out, in) float32`, or, if `is_transposed`, `(in, out)` as `weight` is.

        Raises:
            ModelError: the sizes of the factors do not fit the weight.
        """
        if is_transposed:
            return self.apply(module, weight.t()).t()
        a, b = self.factors(module)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ModelError(
                f"{self.folder}: {module} is {b.shape[0]} x {a.shape[1]} in the adapter and "
                f"{' x '.join(map(str, weight.shape))} in the base: the adapter belongs to another base"
            )
        merged = torch.addmm(weight.float(), b, a, alpha=self.scalings[module])
        magnitude = f"{module}.{_FACTORS[2]}"
        if magnitude in self._names:
            length = self.read(magnitude).view(-1)
            if len(length) != len(merged):
                raise ModelError(
                    f"{self.folder}: {module} has {len(length)} magnitudes for {len(merged)} rows: damaged"
                )
            merged *= (length / merged.norm(dim=1)).unsqueeze(1)
        return merged

    def apply_to_experts(
        self, held: StoredExperts, weight: Tensor, stack: Stack, turned: bool, flipped: bool
    ) -> Tensor:
        """A tensor with experts, merged; float32.

        Args:
            held: which experts, and which part of them.
            weight: as it is in the checkpoint.
            stack: the stack that it belongs to.
            turned: whether a whole stack has inputs before outputs.
            flipped: whether PEFT put A on the outputs of the stack.

        Raises:
            ModelError: the sizes of the factors do not fit the weight.
        """
        a, b = self._factors_of_experts(held.stack)
        n, rank = stack.n_experts, self.ranks[held.stack]
        sizes = (stack.out_features, stack.in_features)
        if (len(a), b.shape[1]) != (rank * n, rank * n) or (b.shape[0], a.shape[1]) != (
            sizes[::-1] if flipped else sizes
        ):
            raise ModelError(
                f"{self.folder}: {held.stack} is {b.shape[0]} x {a.shape[1]} in the adapter and {sizes[0]} x "
                f"{sizes[1]} for {n} experts in the base: the adapter belongs to another base"
            )
        scaling = self.scalings[held.stack]

        def add(expert: int, rows: Tensor) -> None:
            down, up = a[expert * rank : (expert + 1) * rank], b[:, expert::n]
            change = (up @ down).t() if flipped else up @ down
            first = held.part * stack.part_shape[0] if held.expert is not None else 0
            rows.add_(change[first : first + len(rows)], alpha=scaling)

        merged = weight.to(torch.float32, copy=True)
        if held.expert is not None:
            add(held.expert, merged)
        else:
            for expert, rows in enumerate(merged):
                add(expert, rows.t() if turned else rows)
        return merged

    def _factors_of_experts(self, stack: str) -> tuple[Tensor, Tensor]:
        """A and B of all experts, kept for the tensors that follow."""
        if stack not in self._recent:
            if len(self._recent) > 1:  # a layer has two stacks
                self._recent.clear()
            self._recent[stack] = self.factors(stack)
        return self._recent[stack]

    def put_rows(self, module: str, weight: Tensor) -> Tensor:
        """`weight` with the adapter's rows of `module` in their places, grown where it lacks them; float32.

        Raises:
            ModelError: the rows do not fit the weight.
        """
        numbers, values = self.rows[module], self.read(f"{module}.{_ROWS}")
        if values.shape != (len(numbers), weight.shape[1]):
            raise ModelError(
                f"{self.folder}: {module} has rows of {values.shape[-1]} numbers in the adapter and of "
                f"{weight.shape[1]} in the base: the adapter belongs to another base"
            )
        grown = with_mean_rows(weight.float(), max(numbers) + 1)
        return grown.index_copy(0, torch.tensor(numbers), values)


class MergedWeights:
    """The tensors of a base with an adapter's changes, by their names in a checkpoint."""

    def __init__(self, base: BaseWeights, delta: AdapterDelta) -> None:
        """Find the tensor that each change belongs to; `base` and `delta` are open.

        Raises:
            ModelError: the adapter changes something that the base does not have.
        """
        self._base, self._delta = base, delta
        self._saved = set(delta.saved())
        changed = {*self._saved, *(f"{module}.weight" for module in (*delta.modules(), *delta.rows))}
        config = base.source.text_config
        embeddings, head = (f"{name}.weight" for name in embeddings_and_head(base.model))
        is_tied = bool(getattr(config, "tie_word_embeddings", False)) and base.place(embeddings) is not None
        together = delta.keeps_tied and embeddings in self._saved and head.removesuffix(".weight") not in delta.ranks
        self._unties = is_tied and not together and (head in changed or embeddings in self._saved)
        is_one = is_tied and base.place(head) == base.place(embeddings)  # a head that is not stored
        places = {name: None if is_one and name == head else base.place(name) for name in changed}
        missing = sorted(name for name, place in places.items() if place is None and not (is_tied and name == head))
        missing += sorted(delta.stacks - {held.stack for held in base.experts.values()})
        if missing:
            raise ModelError(
                f"{delta.folder}: changes {missing[0].removesuffix('.weight')}, which {base.source.name} does not "
                "have, or in a way that cannot be merged; give the base that it was trained on"
            )
        own_names = {place: name for name, place in places.items()}
        double = next((name for name, place in places.items() if place and own_names[place] != name), None)
        if double:
            raise ModelError(
                f"{delta.folder}: {double} and {own_names[places[double]]} are one weight in {base.source.name}, and "
                "the adapter changes them differently, which no merged weight can hold; use the adapter on its base"
            )
        # Name in the merged folder -> name in the base's files, name in the adapter.
        self._tensors = {name: (name, own_names.get(name, name)) for name in base.names()}
        self._embeddings = base.place(embeddings) or ""
        head_place = head if is_one else base.place(head) or head
        if self._unties:
            self._tensors[head_place] = (self._embeddings, head)
        elif is_tied and head_place in self._tensors:  # stored twice
            self._tensors[head_place] = self._tensors[self._embeddings]

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a merged tensor."""
        place, own = self._tensors[name]
        if own in self._saved:
            return tuple(self._delta.read(own).shape)
        shape = self._base.shape(place)
        rows = self._delta.rows.get(own.removesuffix(".weight"))
        return (max(shape[0], max(rows) + 1), *shape[1:]) if rows else shape

    def read(self, name: str) -> Tensor:
        """A merged tensor; float32 where the adapter changes it."""
        place, own = self._tensors[name]
        if own in self._saved:
            return self._delta.read(own)
        held = self._base.experts.get(place)
        if held is not None and held.stack in self._delta.stacks:
            return self._delta.apply_to_experts(held, self._base.read(place), *self._base.stack_of(held))
        module, tensor = own.removesuffix(".weight"), self._base.read(place)
        if module in self._delta.ranks and own != module:
            tensor = self._delta.apply(module, tensor, place in self._base.transposed)
        return self._delta.put_rows(module, tensor) if module in self._delta.rows and own != module else tensor

    def config_changes(self) -> dict[str, Any]:
        """Settings of config.json that the merged model has and the base does not."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self._unties else {}
        if self._embeddings and self.shape(self._embeddings)[0] != self._base.shape(self._embeddings)[0]:
            changes["vocab_size"] = self.shape(self._embeddings)[0]
        return changes


def merged_bytes(base: BaseWeights, dtype: torch.dtype) -> int:
    """The size of the merged tensors on disk, in bytes."""
    return sum(prod(base.shape(name)) for name in base.names()) * dtype.itemsize


def write_merged(
    base: BaseWeights,
    delta: AdapterDelta,
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the merged tensors and their index into `folder`; the caller writes configuration and tokenizer.

    Returns:
        Settings of config.json in which the merged model differs from the base.

    Raises:
        ModelError: the adapter changes something that the base does not have.
    """
    from safetensors.torch import save_file

    merged = MergedWeights(base, delta)
    sizes = {name: prod(merged.shape(name)) * dtype.itemsize for name in merged.names()}
    shards = plan_shards("model", sizes, SHARD_BYTES)
    total = len(sizes)
    done = 0
    for file, names in shards.files.items():
        shard = {}
        for name in names:
            tensor = merged.read(name)
            shard[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            done += 1
            progress(done, total)
        save_file(shard, folder / file, metadata={"format": "pt"})
    shards.write_index(folder)
    return merged.config_changes()
