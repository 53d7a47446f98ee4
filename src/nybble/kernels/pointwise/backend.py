"""What a backend of the pointwise operators offers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PointwiseBackend(Protocol):
    """The functions of a backend; `pointwise.torch` says what each result must be.

    Activations are float32, float16 or bfloat16, all of one type, contiguous (x of `rope` only within its heads), and
    there is at least one.
    """

    NAME: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
        """x / rms(x) times weight, and 1 / rms(x) `(n,) float32`."""

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
        """dL/dx."""

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up."""

    def gated_backward_(self, grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
        """In place: the product, and the gradients of gate and up."""

    def dropout(self, x: Tensor, p: float, seed: int, out: Tensor) -> None:
        """x with elements zeroed, into out."""

    def dropout_add_(self, total: Tensor, x: Tensor, p: float, seed: int) -> None:
        """total += dropout(x)."""

    def cross_entropy_(self, logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
        """Loss of each row `(n,) float32`; logits become their gradients."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        """x turned to its positions, or back."""

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one token to the cached ones; k and v may have strides."""
