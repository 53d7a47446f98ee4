"""The low-rank matrix that best compensates for the quantization error: a start for LoRA's factors.

With D = W - Q and second moments H of the inputs, B A of rank r minimises tr((D - B A) H (D - B A)^T): for any root
H = L L^T that is the truncated singular value decomposition of D L, taken back by L^-1 (QERA, Zhang et al. 2024,
arXiv 2410.06040; with H = 1 it is LoftQ, Li et al. 2023, arXiv 2310.08659). A and B get equal shares of the size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLED = 16  # directions beyond r that the randomised decomposition follows
_ITERATIONS = 6  # power iterations of its subspace; singular values of quantization errors decrease slowly


def low_rank(difference: Tensor, moments: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A `(rank, in) float32` and B `(out, rank) float32` with B A close to `difference`, `(out, in)`.

    Args:
        difference: the error to compensate for, float32.
        moments: positive definite `(in, in) float32`, or None for the plain Frobenius norm.
        rank: at most the smaller side is used; the rest is zero.
    """
    root = None if moments is None else torch.linalg.cholesky(moments)
    target = difference if root is None else difference @ root
    n = min(rank, *target.shape)
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # repeatable factors; the run's own generator does not change
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(target, q=min(n + _OVERSAMPLED, *target.shape), niter=_ITERATIONS)
    share = s[:n].sqrt()
    right = v[:, :n].t() if root is None else torch.linalg.solve_triangular(root, v[:, :n].t(), upper=False, left=False)
    a, b = difference.new_zeros(rank, target.shape[1]), difference.new_zeros(target.shape[0], rank)
    a[:n], b[:, :n] = share.unsqueeze(1) * right, u[:, :n] * share
    return a, b
