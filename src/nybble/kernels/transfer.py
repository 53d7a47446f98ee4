"""Sending tensors to a device while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on `device`.

    A GPU copies from pinned memory in the order of its own work. From other memory the host would wait for the copy,
    and with it for all that was issued before, such as the step before this one.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
