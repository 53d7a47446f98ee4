"""The tensors of a base, read from its files one at a time, as training saw them or as they are stored.

Memory holds one tensor, and no model is built. A packed weight is returned decoded to float32: it is read from a 4-bit
checkpoint, or packed from the 16-bit one by the same encoder again, which gives the same bytes. Experts have the names
of the family's own checkpoints: a stack that they hold whole is put together from the single weights of a 4-bit one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nybble.errors import ModelError
from nybble.kernels import dequantize
from nybble.models.checkpoint_names import names_in_checkpoint
from nybble.models.expert_files import StoredExperts, name_of_stack, stored_experts
from nybble.models.experts import expert_stacks, experts_to_pack, inputs_first, weights_of
from nybble.models.folder_checks import weight_files
from nybble.models.load import cached_source, packing_config
from nybble.models.skeleton import is_conv1d, linears_to_pack, model_without_weights
from nybble.models.source import ModelSource
from nybble.models.towers import tower_keys
from nybble.nn import Stack
from nybble.quant import SUFFIXES, PackedWeight, from_bnb, stored_shape
from nybble.recipe import QuantizationSection

_COMPANIONS = tuple(f".weight.{suffix}" for suffix in SUFFIXES)


class BaseWeights:
    """Tensors by their names in the checkpoint; the scales of packed ones are not listed. Use as a context manager.

    Of a multimodal checkpoint they are those of its text model.
    """

    def __init__(
        self, source: ModelSource, packing: QuantizationSection | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Open the files of `source`.

        Args:
            source: the checkpoint.
            packing: how training packed the linears; None reads them as they are stored.
            dtype: the type of unpacked tensors in training, from which it packed; None reads them as they are stored.
        """
        self._packing, self._dtype = packing, dtype
        self.original = source  # not its packed form
        if packing is not None and dtype is not None and not source.is_4bit:
            source = cached_source(source, packing, dtype)
        self.source = source
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BaseWeights:
        from safetensors import safe_open

        for shard in weight_files(self.source.folder):
            file = self._stack.enter_context(safe_open(shard, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        if self.source.is_multimodal:
            for name in tower_keys(self.source.config, self._files):
                del self._files[name]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files = {}

    @cached_property
    def model(self) -> Any:
        """The model of this checkpoint, on the meta device."""
        return model_without_weights(self.source.config)

    @cached_property
    def _places(self) -> dict[str, str]:
        return names_in_checkpoint(self.model, self.names())

    @cached_property
    def _to_pack(self) -> set[str | None]:
        """The names of the tensors that training packed."""
        if self._packing is None or self._dtype is None or self.source.is_4bit:
            return set()
        return {self.name_of(module) for module in linears_to_pack(self.model, self._packing.skip_modules)[0]}

    @cached_property
    def transposed(self) -> set[str | None]:
        """The names of the weights of linears that are stored as `(in, out)`."""
        modules = [name for name, module in self.model.named_modules() if is_conv1d(module)]
        return {self.name_of(module) for module in modules}

    @cached_property
    def _stored(self) -> dict[str, StoredExperts]:
        """What the files hold of experts."""
        return stored_experts(self.model, [name for name in self._files if not name.endswith(_COMPANIONS)])

    @cached_property
    def _put_together(self) -> dict[str, dict[tuple[int, int], str]]:
        """Stacks that are read from several tensors: name -> the tensor of each expert and part."""
        found: dict[str, dict[tuple[int, int], str]] = {}
        names = {held.stack: "" for held in self._stored.values() if not held.is_of_family}
        names = {stack: name_of_stack(self.model, stack) for stack in names}
        for key, held in self._stored.items():
            if not held.is_of_family and held.expert is not None:
                found.setdefault(names[held.stack], {})[held.expert, held.part] = key
        return found

    @cached_property
    def experts(self) -> dict[str, StoredExperts]:
        """The tensors, of those that `names` gives, that hold experts."""
        whole = {
            name: StoredExperts(self._stored[next(iter(t.values()))].stack) for name, t in self._put_together.items()
        }
        return {key: held for key, held in self._stored.items() if held.is_of_family} | whole

    def stack_of(self, held: StoredExperts) -> tuple[Stack, bool, bool]:
        """The stack of a tensor, whether the family has inputs before outputs, and whether PEFT does not know that."""
        module = self.model.get_submodule(held.stack.rpartition(".")[0])
        turned = inputs_first(module)
        return self._stacks[held.stack], turned, turned and not getattr(module, "is_transposed", False)

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        return expert_stacks(self.model)

    @cached_property
    def _names(self) -> list[str]:
        parts = {key for tensors in self._put_together.values() for key in tensors.values()}
        single = [name for name in self._files if not name.endswith(_COMPANIONS) and name not in parts]
        return [*single, *self._put_together]

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._names)

    def place(self, name: str) -> str | None:
        """The name in the files of a tensor of the model; None if they do not hold it as it is."""
        return self._places.get(name)

    def name_of(self, module: str) -> str | None:
        """The name of the weight of `module`; None if there is none."""
        return self.place(f"{module}.weight")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as it is stored in 16 bits."""
        if name in self._put_together:
            stack, transposed, _ = self.stack_of(self.experts[name])
            n, rows, columns = stack.n_experts, stack.out_features, stack.in_features
            return (n, columns, rows) if transposed else (n, rows, columns)
        states = [key for key in self._companions(name) if "quant_state" in key]
        if not states:
            return tuple(self._files[name].get_slice(name).get_shape())
        try:
            shape = stored_shape(self._files[states[0]].get_tensor(states[0]))
        except ValueError as error:
            raise ModelError(f"{self.source.folder}: {name}: {error}; download it again") from error
        return shape[::-1] if name in self.transposed else shape

    def read(self, name: str) -> Tensor:
        """One tensor, laid out as in 16 bits; one that is packed, or that training packed, is decoded to float32.

        Raises:
            ModelError: it cannot be unpacked or packed.
        """
        if name in self._put_together:
            return self._whole(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        companions = self._companions(name)
        is_transposed = name in self.transposed
        try:
            if companions:
                prefix = f"{name}."
                found = {key.removeprefix(prefix): self._files[key].get_tensor(key) for key in companions}
                return _turned(dequantize(from_bnb(tensor, found), torch.float32), is_transposed)
            if self._dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._dtype)
            if name in self._to_pack and self._packing is not None:
                packed = packing_config(self._packing, tensor.dtype).pack(_turned(tensor, is_transposed))
                return _turned(dequantize(packed, torch.float32), is_transposed)
            if name in self._experts_to_pack and self._packing is not None:
                return self._packed_experts(name, tensor, packing_config(self._packing, tensor.dtype).pack)
        except ValueError as error:
            raise ModelError(f"{self.source.folder}: {name}: {error}; the checkpoint is damaged") from error
        return tensor

    @cached_property
    def _experts_to_pack(self) -> set[str]:
        """The names of the tensors with experts that training packed."""
        if self._packing is None or self._dtype is None or self.source.is_4bit:
            return set()
        owners = set(experts_to_pack(self.model, self._packing.skip_modules)[0])
        return {name for name, held in self.experts.items() if held.stack.rpartition(".")[0] in owners}

    def _packed_experts(self, name: str, tensor: Tensor, pack: Callable[[Tensor], PackedWeight]) -> Tensor:
        """A tensor with experts as training packed it, decoded."""
        held = self.experts[name]
        stack, transposed, _ = self.stack_of(held)
        if held.expert is not None:
            return dequantize(pack(tensor), torch.float32)
        whole = torch.empty(tensor.shape)
        for expert, own in zip(whole, tensor, strict=True):
            rows = expert.t() if transposed else expert
            n = stack.part_shape[0]
            for part, weight in enumerate(weights_of(stack, own, transposed)):
                rows[part * n : (part + 1) * n] = dequantize(pack(weight), torch.float32)
        return whole

    def _whole(self, name: str) -> Tensor:
        """A stack, put together from the packed weights of its experts."""
        stack, transposed, _ = self.stack_of(self.experts[name])
        keys, shape = self._put_together[name], self.shape(name)
        if len(keys) != stack.n_experts * len(stack.parts):
            raise ModelError(f"{self.source.folder}: {name}: {len(keys)} weights of experts; download it again")
        whole = torch.empty(shape)
        n = stack.part_shape[0]
        for (expert, part), key in keys.items():
            rows = whole[expert].t() if transposed else whole[expert]
            rows[part * n : (part + 1) * n] = self.read(key)
        return whole

    def _companions(self, name: str) -> list[str]:
        return [key for key in (f"{name}.{suffix}" for suffix in SUFFIXES) if key in self._files]


def _turned(weight: Tensor, is_transposed: bool) -> Tensor:
    return weight.t().contiguous() if is_transposed else weight
