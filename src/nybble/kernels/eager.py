"""Whether an operator may be left out: its backend is called directly, without the 40 us that torch takes between."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, no gradients are recorded and nobody traces."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would take longer than all else here
        if type(tensor) not in _KINDS:
            return False
    return True
