"""What a backend of the 4-bit operators offers, and the adapter that a product may carry."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nybble.kernels.ops4bit.torch import LowRank
from nybble.quant import CalibrationSteps, PackedWeight


class Ops4bitBackend(CalibrationSteps, Protocol):
    """The functions of a backend: the loops of the encoder, and these. `ops4bit.torch` says what each result must be.

    Everything but sums must be bit-identical to it.
    """

    NAME: str

    def dequantize(self, weight: PackedWeight, out: Tensor) -> None:
        """Decode `weight` into `out`: contiguous, `weight.shape`, float32, float16 or bfloat16."""

    def most_rows(self, dtype: torch.dtype, weight: PackedWeight) -> int:
        """Rows of `dtype` up to which `multiply` is the fastest way."""

    def multiply(self, x: Tensor, weight: PackedWeight, low_rank: LowRank | None = None) -> Tensor:
        """x (W + s B A)^T in the type of x, for contiguous x of at most 8 rows, or `most_rows`."""

    def multiply_dense(self, x: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """The same for contiguous x of at most 8 rows and W of its type, not packed."""
