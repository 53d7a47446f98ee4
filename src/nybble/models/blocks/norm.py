"""Norms: of the root mean square, with a frozen weight, or of mean and variance by torch's own operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.nn.norm import rms_norm


def norm_forwards(module: nn.Module) -> Sequence[Callable[..., Any]]:
    """Forwards for a norm over the last dimension that is written out in Python."""
    weights = dict(module.named_parameters(recurse=False))
    eps = _eps_of(module)
    if eps is None or type(module) is nn.LayerNorm or set(weights) != {"weight"} or weights["weight"].ndim != 1:
        return ()
    # Gemma's weight is an offset from 1; its norms and Llama's round at different places.
    by_mean_square = [partial(_rms_norm, eps, unit_offset) for unit_offset in (False, True)]
    return (*by_mean_square, partial(_layer_norm, eps))


def _eps_of(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _rms_norm(eps: float, unit_offset: bool, module: Any, x: Tensor) -> Tensor:
    if module.weight.requires_grad and torch.is_grad_enabled():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return rms_norm(x, module.weight, eps, unit_offset)


def _layer_norm(eps: float, module: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), module.weight.to(x.dtype), None, eps)
