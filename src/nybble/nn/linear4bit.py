"""A linear layer whose frozen weight is stored in 4 bits.

    y = x W^T + b        dL/dx = dL/dy W

W is decoded to the compute type for each product and dropped again: nothing but x's gradient path and the packed bytes
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

    `weight` holds the packed bytes, `(n / 2, 1) uint8`, and the scales are buffers beside it, all plain tensors: a
    module moves, shards and counts like any other. In a state dict they carry bitsandbytes' keys. Until `set_packed`
    is called the layer is an empty shell on the meta device. A few rows without gradients, as in generation, are
    multiplied without writing the decoded weight.
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
        self.slice_elements = 0  # above 0: products decode about so many weights at a time
        self._packed: PackedWeight | None = None
        self.weight.requires_grad_(False)
        for name in _SCALES:
            self.register_buffer(name, None)

    def set_packed(self, packed: PackedWeight) -> None:
        """Take over `packed` as the weight.

        Raises:
            ValueError: its shape is not this layer's.
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
        """The weight as a value; shares memory with the layer."""
        # Scales that are a parameter come and go with their shards: nothing is kept of them.
        weight, absmax, kept = self._parameters["weight"], self._buffers.get("absmax"), self._packed
        if weight is None or absmax is None or not is_eager(weight, absmax):
            return self._value()
        # One token needs it of every layer: made anew only where the layer has other memory.
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
        """Hold the scales as a frozen parameter beside the codes, as what shards parameters alone needs it.

        Under double quantization the scales' own, 4 bytes for 16,384 weights, stay a buffer.
        """
        absmax = self._buffers.pop("absmax")
        if absmax is not None:
            self.register_parameter("absmax", nn.Parameter(absmax, requires_grad=False))

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed bytes under the name by which PEFT recognises a layer that it must ask to `dequantize()`."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as numbers, `(out_features, in_features)` in `dtype` (default: the compute type)."""
        return dequantize(self.packed, dtype or self.compute_dtype)

    def decoded(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`, some of its rows at a time: which, and they, good until the next of this thread.

        All at once, unless `slice_elements` says otherwise. The memory is used again.
        """
        if torch.compiler.is_compiling():  # traced code gets memory of its own
            yield slice(None), self.dequantize(dtype)
            return
        packed = self.packed
        is_whole = not 0 < self.slice_elements < packed.n_elements
        parts = ((slice(None), packed),) if is_whole else packed.slices(self.slice_elements)
        for rows, part in parts:
            generation = workspace.generation + 1
            # Nothing here refers to the numbers while others use them: they go before the next ones come.
            yield rows, dequantize(part, dtype, workspace.take(part.shape, self.weight, dtype))
            if __debug__ and workspace.generation != generation:
                raise RuntimeError("a decoded weight was in use when its memory was taken for something else")

    def projection(self) -> Projection:
        """What this layer computes, for blocks that do their own products."""
        return Projection(self, self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """`(..., in_features)` -> `(..., out_features)` in the type of `input`, computed in the compute type."""
        return project(input, (self.projection(),))[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """`.to()` and its kin move the scales and never round them: other scales would be other weights."""
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
        # The scales travel under bitsandbytes' keys, not as buffers.
        own = {f"{prefix}{name}" for name in _SCALES}
        missing_keys[:] = [key for key in missing_keys if key not in own]
