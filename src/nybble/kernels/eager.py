"""Whether an operator may be left out: its path is then called directly, without the 40 us that torch takes between."""

from __future__ import annotations

import torch
from torch import Tensor


def is_eager(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, no gradients are recorded and nobody traces."""
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
