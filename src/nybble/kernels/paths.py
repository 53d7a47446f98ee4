"""Which code runs the operators on a device: the fastest path that is there."""

from __future__ import annotations

from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from nybble.kernels import plain
from nybble.quant import PackedWeight, Steps


class Path(Steps, Protocol):
    """What a path must offer: the loops of the encoder, and these. All results are bit-identical but sums."""

    NAME: str  # as run.json shows it

    def dequantize(self, weight: PackedWeight, out: Tensor) -> None:
        """Decode `weight` into `out`: contiguous, `weight.shape`, float32, float16 or bfloat16."""

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x W^T, `(rows, out_features)` in the type of x, for contiguous x of at most 8 rows."""


def path_for(device: torch.device) -> Path:
    """The path that the operators take on `device`."""
    return _path_of_kind(device.type)


@cache
def _path_of_kind(kind: str) -> Path:
    return cast(Path, plain)
