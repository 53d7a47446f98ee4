"""A linear layer whose frozen weight is stored in 4 bits.

    y = x W^T + b        dL/dx = dL/dy W

W is decoded to the compute type for each product and then dropped: only the gradient path of x and the packed bytes
outlive the forward pass (Dettmers et al. 2023, section 3). The weight never gets a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nybble.kernels import dequantize, is_eager
from nybble.nn.lora_projection import Projection, project
from nybble.nn.workspace import workspace
from nybble.quant import SUFFIXES, PackedWeight, from_bnb, to_bnb

_SCALES = ("absmax", "nested_absmax", "nested_offset")


class Linear4bit(nn.Linear):
    """`nn.Linear` over a `PackedWeight`.

    `weight` holds the packed bytes, `(n / 2, 1) uint8`, and the scales are buffers of the same module. All are plain
    tensors: the module can be moved, sharded and counted like any other. In a state dict they have bitsandbytes' keys.
    Until `set_packed` is called, the layer is an empty shell on the meta device. A few rows without gradients, as in
    generation, are multiplied without writing the decoded weight.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, compute_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)
        self.compute_dtype = compute_dtype
        self.quant_type = "nf4"
        self.block_size = 64
        self.source_dtype = compute_dtype
        self.stored_transposed = False  # a 16-bit checkpoint has the weight as (in, out), as of transformers' Conv1D
        self.slice_elements = 0  # above 0: products decode about this many weights at a time
        self._packed: PackedWeight | None = None
        self.weight.requires_grad_(False)
        for name in _SCALES:
            self.register_buffer(name, None)

    def set_packed(self, packed: PackedWeight) -> None:
        """Use `packed` as the weight of this layer.

        Raises:
            ValueError: the shape of `packed` is not that of this layer.
        """
        if packed.shape != (self.out_features, self.in_features):
            raise ValueError(f"shape {packed.shape} does not fit the layer's {(self.out_features, self.in_features)}")
        self.weight = nn.Parameter(packed.packed, requires_grad=False)
        self.absmax = packed.absmax
        self.nested_absmax = packed.nested_absmax
        self.nested_offset = packed.nested_offset
        self.quant_type = packed.quant_type
        self.block_size = packed.block_size
        self.source_dtype = packed.dtype
        self._packed = None

    @property
    def packed(self) -> PackedWeight:
        """The weight as a `PackedWeight` that shares memory with the layer."""
        # Scales that are a parameter change when their shards are gathered, so no reference to them is stored.
        weight, absmax, kept = self._parameters["weight"], self._buffers.get("absmax"), self._packed
        if weight is None or absmax is None or not is_eager(weight, absmax):
            return self._value()
        # Each token needs this of every layer, so it is built again only where the layer's memory has changed.
        if kept is None or kept.absmax is not absmax or kept.packed.data_ptr() != weight.data_ptr():
            kept = self._packed = self._value()
        return kept

    def _value(self) -> PackedWeight:
        return PackedWeight(
            self.weight.data,
            self.absmax,
            (self.out_features, self.in_features),
            self.block_size,
            self.quant_type,
            self.source_dtype,
            self.nested_absmax,
            self.nested_offset,
        )

    @property
    def is_packed(self) -> bool:
        """Whether `set_packed` has been called."""
        return self.absmax is not None

    def scales_as_parameter(self) -> None:
        """Hold the scales as a frozen parameter next to the codes, for code that shards only parameters.

        Under double quantization the scales of the scales, 4 bytes for 16,384 weights, stay a buffer.
        """
        absmax = self._buffers.pop("absmax")
        if absmax is not None:
            self.register_parameter("absmax", nn.Parameter(absmax, requires_grad=False))

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed bytes under the name by which PEFT recognises a layer that it must ask to `dequantize()`."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, `(out_features, in_features)` in `dtype` (default: the compute type)."""
        return dequantize(self.packed, dtype or self.compute_dtype)

    def decoded(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`, some rows at a time: which rows, and their values, valid until the thread's next use.

        All rows come at once, unless `slice_elements` is set. The memory is reused.
        """
        if torch.compiler.is_compiling():  # traced code allocates memory of its own
            yield slice(None), self.dequantize(dtype)
            return
        packed = self.packed
        is_whole = not 0 < self.slice_elements < packed.n_elements
        parts = ((slice(None), packed),) if is_whole else packed.slices(self.slice_elements)
        for rows, part in parts:
            generation = workspace.generation + 1
            # Nothing here refers to the values while the caller uses them, so they are freed before the next ones come.
            yield rows, dequantize(part, dtype, workspace.take(part.shape, self.weight, dtype))
            if __debug__ and workspace.generation != generation:
                raise RuntimeError("a decoded weight was in use when its memory was taken for something else")

    def projection(self) -> Projection:
        """The projection that this layer computes, for blocks that do their own products."""
        return Projection(self, self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """`(..., in_features)` -> `(..., out_features)` in the type of `input`, computed in the compute type."""
        return project(input, (self.projection(),))[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """`.to()` and similar calls move the scales but never round them: other scales would give other weights."""
        scales = {name: getattr(self, name) for name in _SCALES}
        self._packed = None
        super()._apply(fn, recurse)
        for name, before in scales.items():
            if before is not None and getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Shape and format, as `print(model)` shows them."""
        return f"{super().extra_repr()}, {self.quant_type}, block={self.block_size}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()
        if self.is_packed:
            for suffix, tensor in to_bnb(self.packed).items():
                destination[f"{prefix}weight.{suffix}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        companions = {s: state_dict.pop(f"{prefix}weight.{s}") for s in SUFFIXES if f"{prefix}weight.{s}" in state_dict}
        if companions:
            shape = (self.out_features, self.in_features)
            self.set_packed(from_bnb(state_dict[f"{prefix}weight"], companions, shape))
        elif f"{prefix}weight" in state_dict:
            error_msgs.append(f"{prefix}weight: 4-bit codes without their scales ({prefix}weight.absmax and so on)")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # The scales are saved under bitsandbytes' keys, not as buffers.
        own = {f"{prefix}{name}" for name in _SCALES}
        missing_keys[:] = [key for key in missing_keys if key not in own]
