"""Preference tuning: what is minimised of pairs of answers of which one is preferred, or of answers that were rated.

A pair is a tree of data: the prompt, once, and the two answers that continue it. The model gives the log-probability of
each learned token without logits; their sums by answer, and those of the reference, make the loss. Its gradient by a
token's log-probability is what autograd hands back to the head. Losses of the pairs of a step are divided by their
number in the whole step, so it does not matter how the step is split; that is why kto's divergence from the reference,
which is a mean over the step as well, is measured before the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import send
from nybble.recipe import PreferencesSection
from nybble.training import preference_losses as losses
from nybble.training.answers import sums_by_answer, token_log_probabilities, with_answers
from nybble.training.dataloader import MicroBatch, StepLoader
from nybble.training.reference import Reference

_FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
_LOGPS = ("logps/chosen", "logps/rejected")


class PairObjective:
    """dpo, ipo, orpo and simpo: of two answers, the chosen one comes first."""

    figures: tuple[str, ...] = (*_FIGURES, *_LOGPS)

    def __init__(self, section: PreferencesSection, reference: Reference | None = None) -> None:
        """`reference` is None for objectives that need none."""
        self._section = section
        self._reference = reference

    def collate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the places of its answers."""
        return with_answers(batch, self._section.ld_alpha, self._section.objective == "orpo")

    def counts(self, batch: MicroBatch) -> tuple[int, ...]:
        """The pairs, and the tokens of the supervised loss that may be added."""
        sizes = batch.inputs["answer_lengths"]
        n_prompts = len(batch.inputs["targets"]) - sum(sizes)
        return len(sizes) // 2, sum(sizes[::2]) + n_prompts

    def begin_step(self, model: Any, loader: StepLoader, step: int) -> None:
        """The reference's log-probabilities of this step's rows, if they are not known yet."""
        if self._reference is not None:
            self._reference.complete(model, loader.places_of(step))

    def beside(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The reference's log-probabilities."""
        return {} if self._reference is None else {"reference": self._reference.of(places)}

    def __call__(self, model: Any, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss, and rewards and log-probabilities of the answers."""
        section = self._section
        n_pairs, n_tokens = counts
        each = token_log_probabilities(model, inputs)
        chosen, rejected = sums_by_answer(each, inputs).view(-1, 2).unbind(1)
        total, rewards = self._losses(chosen, rejected, inputs)
        loss = total.sum() / n_pairs
        weight = 1.0 if section.objective == "orpo" else section.rpo_alpha
        if weight:
            loss = loss - weight * self._supervised(each, inputs) / n_tokens
        if not len(chosen):
            loss = loss + 0 * each.sum()  # nothing is compared here, and other processes wait for gradients
        if section.objective in ("orpo", "simpo"):  # TRL reports what these objectives compare
            chosen, rejected = (side / n for side, n in zip((chosen, rejected), self._lengths(inputs), strict=True))
        return loss, figures_of_pairs(*rewards, chosen, rejected) / n_pairs

    def _losses(self, chosen: Tensor, rejected: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of each pair, and the rewards of chosen and rejected answers."""
        section = self._section
        lengths = self._lengths(inputs)
        if section.objective in ("orpo", "simpo"):
            means = (chosen / lengths[0], rejected / lengths[1])
            rewards = (section.beta * means[0].detach(), section.beta * means[1].detach())
            if section.objective == "orpo":
                return losses.orpo(*means, section.beta), rewards
            return losses.simpo(*means, section.beta, section.simpo_gamma, section.label_smoothing), rewards
        ratios = (torch.stack([chosen, rejected], 1) - inputs["reference"].view(-1, 2)).unbind(1)
        rewards = (section.beta * ratios[0].detach(), section.beta * ratios[1].detach())
        if section.objective == "ipo":
            return losses.ipo(ratios[0] / lengths[0], ratios[1] / lengths[1], section.beta), rewards
        return losses.dpo(ratios[0], ratios[1], section.beta, section.loss_type, section.label_smoothing), rewards

    def _lengths(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Learned tokens of the chosen and of the rejected answers, float32."""
        sizes = torch.tensor(inputs["answer_lengths"], dtype=torch.float32, device="cpu").view(-1, 2)
        return send(sizes, inputs["input_ids"].device).unbind(1)

    def _supervised(self, each: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The summed log-probability of the chosen answers, and of their prompts if those are learned."""
        sizes = inputs["answer_lengths"]
        parts = each.split((*sizes, len(each) - sum(sizes)))
        return torch.stack([part.sum() for part in (*parts[:-1:2], parts[-1])]).sum()


class RatedObjective:
    """kto: each answer is good or bad."""

    figures: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", *_LOGPS, "kl")

    def __init__(self, section: PreferencesSection, reference: Reference, desirable: Tensor) -> None:
        """`desirable`: of each example, whether its answer is a good one, `(examples,) bool`."""
        self._section = section
        self._reference = reference
        self._desirable = desirable
        self._kl = torch.zeros(())

    def collate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the places of its answers."""
        return with_answers(batch)

    def counts(self, batch: MicroBatch) -> tuple[int, ...]:
        """All answers, the good and the bad ones."""
        good = int(self._desirable[list(batch.places)].sum())
        return len(batch.places), good, len(batch.places) - good

    def begin_step(self, model: Any, loader: StepLoader, step: int) -> None:
        """Measure how far the model is from the reference, on prompts with the answers of other rows of the step."""
        places = loader.places_of(step)
        self._reference.complete(model, places)
        self._kl = self._reference.divergence(model, places).clamp(min=0)

    def beside(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The reference's log-probabilities, and which answers are good."""
        return {"reference": self._reference.of(places), "desirable": self._desirable[list(places)]}

    def __call__(self, model: Any, inputs: dict[str, Any], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss; rewards and log-probabilities are means over the good and over the bad answers."""
        section = self._section
        each = token_log_probabilities(model, inputs)
        logps = sums_by_answer(each, inputs)
        desirable, kl = inputs["desirable"], self._kl.to(logps.device)
        ratios = logps - inputs["reference"]
        total = losses.kto(ratios, desirable, kl, section.beta, (section.desirable_weight, section.undesirable_weight))
        loss = total.sum() / counts[0]
        if not len(logps):
            loss = loss + 0 * each.sum()
        good, bad = desirable / counts[1].clamp(min=1), ~desirable / counts[2].clamp(min=1)
        rewards, shown = section.beta * ratios.detach(), logps.detach()
        means = [(rewards * good).sum(), (rewards * bad).sum(), (shown * good).sum(), (shown * bad).sum()]
        return loss, torch.stack([*means, kl * len(logps) / counts[0]])


def figures_of_pairs(chosen_rewards: Tensor, rejected_rewards: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The sums over pairs of what `PairObjective.figures` names, `(6,) float32`, without a graph."""
    right = (chosen_rewards > rejected_rewards).float()
    margins = chosen_rewards - rejected_rewards
    parts = (chosen_rewards, rejected_rewards, right, margins, chosen, rejected)
    return torch.stack([part.detach().sum() for part in parts])
