"""What held-out pairs and rated answers say about a preference objective.

A reward is what the objective learns: beta times the log-ratio to the reference (dpo, ipo, kto), or beta times the
log-probability a token (orpo, simpo).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from nybble.data import IGNORED, Example
from nybble.intervals import share_interval
from nybble.recipe import PreferencesSection
from nybble.run.record import PreferenceFigures

Answers = Sequence[tuple[float, ...]]  # the log-probabilities of each example's answers


def answer_sizes(example: Example) -> tuple[int, ...]:
    """The learned tokens of each answer: of the chosen and of the rejected one of a pair, else of all."""
    if not example.is_pair:
        return (example.n_trained,)
    ends = list(accumulate(length for length, _parent in example.segments))
    return tuple(sum(label != IGNORED for label in example.labels[a:b]) for a, b in pairwise(ends))


@dataclass(frozen=True)
class HeldOutPreferences:
    """Measures the answers of held-out rows by the objective's own rewards."""

    section: PreferencesSection
    reference: Answers = ()  # of the same rows, where the objective compares with it; empty: not known yet

    def figures(self, examples: Sequence[Example], found: Answers) -> PreferenceFigures:
        """The figures of answers whose log-probabilities are `found`."""
        pairs = [row for row, e in zip(found, examples, strict=True) if e.is_pair]
        likelier = fmean(chosen > rejected for chosen, rejected in pairs) if pairs else None
        if self.section.needs_reference and not self.reference:
            return PreferenceFigures(len(found), likelier)
        sizes = [answer_sizes(e) for e in examples]
        rewards = self._rewards(found, sizes)
        if self.section.compares:
            chosen, rejected = ([row[side] for row in rewards] for side in (0, 1))
            right = [a > b for a, b in rewards]
        else:
            labels = [bool(e.is_desirable) for e in examples]
            chosen = [own[0] for own, is_good in zip(rewards, labels, strict=True) if is_good]
            rejected = [own[0] for own, is_good in zip(rewards, labels, strict=True) if not is_good]
            right = [own[0] > 0 if is_good else own[0] < 0 for own, is_good in zip(rewards, labels, strict=True)]
        noise = share_interval([right])
        means = [fmean(values) if values else None for values in (chosen, rejected)]
        return PreferenceFigures(
            n_rows=len(found),
            likelier=likelier,
            accuracy=fmean(right),
            accuracy_low=None if noise is None else noise.low,
            accuracy_high=None if noise is None else noise.high,
            chosen_reward=means[0],
            rejected_reward=means[1],
            margin=None if means[0] is None or means[1] is None else means[0] - means[1],
            log_ratio=self._log_ratio(found, sizes),
        )

    def _rewards(self, found: Answers, sizes: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        beta = self.section.beta
        if self.section.needs_reference:
            both = zip(found, self.reference, strict=True)
            return [tuple(beta * (a - b) for a, b in zip(*rows, strict=True)) for rows in both]
        return [tuple(beta * a / n for a, n in zip(*rows, strict=True)) for rows in zip(found, sizes, strict=True)]

    def _log_ratio(self, found: Answers, sizes: Sequence[tuple[int, ...]]) -> float | None:
        if not self.reference:
            return None
        ratios = sum(sum(a) - sum(b) for a, b in zip(found, self.reference, strict=True))
        return ratios / sum(map(sum, sizes))
