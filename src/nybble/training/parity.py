"""The first steps compared with the plain path: transformers' and PEFT's own code on padded rows, in plain torch.

Both paths compute loss and gradients of the same weights on the same rows, without dropout (whose masks differ by
design), before the step itself runs. So a fast path that computes something else on this machine is noticed before
anything is trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.data import IGNORED, PadBatch
from nybble.data.batches import FLAT_INPUTS, rows_of
from nybble.errors import CannotRunError
from nybble.training.objective import next_token_loss

# Relative differences. In bfloat16 both sides round every product: over 100 steps of stories260K the loss was at most
# 9e-4 apart and the gradients 6e-2; in float32 3e-7 and 3e-6 (docs/guide/performance.md).
_ALLOWED = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 1e-1), torch.float16: (5e-3, 5e-2)}


@dataclass(frozen=True)
class Parity:
    """The difference of the two paths on one micro-batch."""

    loss: float
    plain_loss: float
    gradient_difference: float  # norm of the difference over the norm, all trained weights together

    @property
    def loss_difference(self) -> float:
        """Relative."""
        return abs(self.loss - self.plain_loss) / max(abs(self.plain_loss), 1e-6)


def compare(model: Any, inputs: dict[str, Any], n_learned: Tensor, dtype: torch.dtype) -> Parity:
    """Compare loss and gradients of a flattened micro-batch on both paths, computed in `dtype`."""
    weights = [p for p in model.parameters() if p.requires_grad]
    n = int((inputs["labels"] != IGNORED).sum())  # an objective may go on with prompts
    inputs = {name: inputs[name] for name in FLAT_INPUTS}
    inputs |= {name: inputs[name][:n] for name in ("learned", "targets")}
    with _without_dropout(model):
        loss, ours = _gradients(model, weights, inputs, n_learned, dtype)
        with plain_path(model):
            plain_loss, plain = _gradients(model, weights, _padded(inputs), n_learned, dtype)
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, plain, strict=True))
    size = sum(float(b.double().square().sum()) for b in plain)
    return Parity(loss, plain_loss, (apart / size) ** 0.5 if size else apart**0.5)


def check(parity: Parity, step: int, dtype: torch.dtype) -> None:
    """Refuse to train where the paths differ by more than rounding.

    Raises:
        CannotRunError: they differ.
    """
    loss_allowed, gradient_allowed = _ALLOWED[dtype]
    if parity.loss_difference <= loss_allowed and parity.gradient_difference <= gradient_allowed:
        return
    raise CannotRunError(
        f"step {step}: the fast path gives loss {parity.loss:.5f}, the plain path {parity.plain_loss:.5f}; gradients "
        f"are {100 * parity.gradient_difference:.1f} % apart (allowed: {100 * gradient_allowed:g} %); nothing was "
        "trained on it: run nybble doctor to see which path computes wrongly here"
    )


@contextmanager
def plain_path(model: nn.Module) -> Iterator[None]:
    """Within this context, modules run the forward pass of their class, and adapters that of PEFT."""
    from nybble.models.lora_linear import LoraLinear

    ours = {m: m.__dict__.pop("forward") for m in model.modules() if _is_ours(m)}
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        layer.plain = True
    try:
        yield
    finally:
        for module, forward in ours.items():
            module.forward = forward
        for layer in layers:
            layer.plain = False


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    function = getattr(getattr(forward, "__func__", None), "func", getattr(forward, "__func__", None))
    return getattr(function, "__module__", "").startswith("nybble.models.blocks.")


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    silenced = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in silenced:
        module.eval()
    try:
        yield
    finally:
        for module in silenced:
            module.train()


def _gradients(
    model: Any, weights: list[nn.Parameter], inputs: dict[str, Any], n_learned: Tensor, dtype: torch.dtype
) -> tuple[float, tuple[Tensor, ...]]:
    with torch.autocast(n_learned.device.type, dtype, enabled=dtype != torch.float32):
        loss = next_token_loss(model, inputs, n_learned).float()
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    filled = tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
    return loss.item(), filled


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows of a flattened batch side by side."""
    device = inputs["input_ids"].device
    return {name: value.to(device) for name, value in PadBatch(0)([rows_of(inputs)]).items()}
