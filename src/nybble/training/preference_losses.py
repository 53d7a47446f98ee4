"""The losses of preference tuning, each of one pair or one rated answer, as TRL 1.16 computes them.

A log-ratio is log p(answer) under the model, less that under the reference: the sum over the answer's tokens. Every
function takes and returns tensors `(pairs,)` or `(answers,)` float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str, smoothing: float) -> Tensor:
    """Of log-ratios, with d = chosen - rejected and e = `smoothing`, the share of pairs in the wrong order.

    sigmoid: -(1 - e) log s(beta d) - e log s(-beta d) (Rafailov et al. 2023; with e Mitchell 2023, which TRL has
    dropped); hinge: max(0, 1 - beta d) (Zhao et al. 2023); robust: (-(1 - e) log s(beta d) + e log s(-beta d)) /
    (1 - 2 e) (Chowdhury et al. 2024).
    """
    logits = beta * (chosen - rejected)
    if loss_type == "hinge":
        return torch.relu(1 - logits)
    right, wrong = -logsigmoid(logits) * (1 - smoothing), -logsigmoid(-logits) * smoothing
    return (right - wrong) / (1 - 2 * smoothing) if loss_type == "robust" else right + wrong


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2 of log-ratios a token, d = chosen - rejected (Azar et al. 2023, equation 17)."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def kto(ratios: Tensor, desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """w (1 - s(beta (ratio - kl))) of a good answer, w (1 - s(beta (kl - ratio))) of a bad one.

    Ethayarajh et al. 2024, equation 7, with s the sigmoid.

    `weights` are those of good and of bad answers.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, *weights)
    return weight * (1 - torch.sigmoid(beta * sign * (ratios - kl)))


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-beta log s(log odds ratio) of log-probabilities a token (Hong et al. 2024); the supervised loss is added."""
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * logsigmoid(odds)


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, smoothing: float) -> Tensor:
    """-log s(beta d - gamma) of log-probabilities a token, d = chosen - rejected (Meng et al. 2024)."""
    logits = beta * (chosen - rejected) - gamma
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, without the loss of digits that either form has where the other is used.

    An answer that is certain has x = 0: it counts as one whose probability is the largest float32 below 1.
    """
    x = x.clamp(max=-torch.finfo(torch.float32).eps / 2)
    is_near = x > -0.6931472  # -log 2: Maechler 2012
    near = torch.log(-torch.expm1(torch.where(is_near, x, -1.0)))
    return torch.where(is_near, near, torch.log1p(-torch.exp(torch.where(is_near, -1.0, x))))
