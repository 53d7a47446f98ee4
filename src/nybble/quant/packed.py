"""A packed weight: the contents of a 4-bit tensor, however it was made or read.

Layout (bitsandbytes'): the weight is read as one row of numbers; consecutive runs of `block_size` share a scale; two
codes share a byte, the first in the high nibble. Scales are `absmax` in float32, or under double quantization codes of
the 8-bit table, which in turn share a float32 scale in runs of 256 after a common offset is taken off:

    weight = code4[nibble] * absmax[i // block_size]
    absmax = code8[byte] * nested_absmax[block // 256] + nested_offset

One block worked by hand: weights (1.0, -0.5, 0.1, 0.0), block of 4 for brevity: absmax 1.0, nearest NF4 values 1.0
(code 15), -0.525 (2), 0.0796 (8), 0.0 (7), bytes 0xF2 0x87.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from nybble.quant.codebooks import BLOCK_SIZES, QUANT_TYPES

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight in 4 bits. Immutable; `to` returns another."""

    packed: Tensor  # (ceil(n / 2), 1) uint8, first code in the high nibble
    absmax: Tensor  # (n_blocks,) float32, or uint8 codes under double quantization
    shape: tuple[int, ...]
    block_size: int
    quant_type: str  # "nf4" or "fp4"
    dtype: torch.dtype  # the type of the weight before packing; readers decode to it by default
    nested_absmax: Tensor | None = None  # (ceil(n_blocks / 256),) float32
    nested_offset: Tensor | None = None  # () float32

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {self.quant_type!r}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block size must be one of {BLOCK_SIZES}, got {self.block_size}")
        n, n_blocks = self.n_elements, self.n_blocks
        if n == 0:
            raise ValueError(f"a weight of shape {self.shape} has nothing to pack")
        if self.packed.dtype != torch.uint8 or self.packed.numel() != (n + 1) // 2:
            raise ValueError(f"{n} weights need {(n + 1) // 2} uint8 bytes, got {_seen(self.packed)}")
        scale_dtype = torch.uint8 if self.is_nested else torch.float32
        if self.absmax.dtype != scale_dtype or self.absmax.numel() != n_blocks:
            raise ValueError(f"{n_blocks} blocks need as many {scale_dtype} scales, got {_seen(self.absmax)}")
        if (self.nested_absmax is None) != (self.nested_offset is None):
            raise ValueError("nested_absmax and nested_offset go together")
        if self.nested_absmax is not None:
            needed = -(-n_blocks // NESTED_BLOCK_SIZE)
            if self.nested_absmax.dtype != torch.float32 or self.nested_absmax.numel() != needed:
                raise ValueError(f"{n_blocks} scales need {needed} float32 scales, got {_seen(self.nested_absmax)}")

    @property
    def n_elements(self) -> int:
        """The number of weights."""
        return prod(self.shape)

    @property
    def n_blocks(self) -> int:
        """The number of blocks of `block_size` weights, the last of which may be shorter."""
        return -(-self.n_elements // self.block_size)

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def slices(self, n_elements: int) -> Iterator[tuple[slice, PackedWeight]]:
        """The weight in slices of rows of about `n_elements` weights: which rows, and the slice, which shares memory.

        The weight must be a matrix. A slice ends where a byte, a block and a group of nested scales end.
        """
        n_rows, width = self.shape
        run = self.block_size * (NESTED_BLOCK_SIZE if self.is_nested else 1)
        unit = run // gcd(run, width)  # the smallest number of rows that holds whole groups
        step = max(1, n_elements // (unit * width)) * unit
        for first in range(0, n_rows, step):
            rows = slice(first, min(first + step, n_rows))
            start, end = rows.start * width, rows.stop * width
            nested = self.nested_absmax[start // run : -(-end // run)] if self.nested_absmax is not None else None
            yield (
                rows,
                replace(
                    self,
                    packed=self.packed[start // 2 : (end + 1) // 2],
                    absmax=self.absmax[start // self.block_size : -(-end // self.block_size)],
                    shape=(rows.stop - rows.start, width),
                    nested_absmax=nested,
                ),
            )

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _seen(tensor: Tensor) -> str:
    return f"{tensor.numel()} {tensor.dtype}"
