"""The learning-rate probe: short runs from the same start, judged by their held-out loss.

The rate matters more for the result than method, rank or initialisation, and each kind of training has its own. A
branch is the run in small: as many steps as the budget allows, with the run's own schedule shortened to them. Of the
rates that are as good as the best (95 %, over the same rows) the probe chooses the lowest, because short runs favour
high rates. Nothing of a branch stays: the weights are restored, and the run is the one that the rate, given in the
recipe, would have brought about.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.data import Example, Groups
from nybble.errors import InputError, RecipeError, StoppedError
from nybble.intervals import Sums, interval
from nybble.recipe import TrainingSection
from nybble.run.directory import RunDirectory, to_json
from nybble.run.record import Evaluation, Observer, Silent
from nybble.storage.atomic import write_text
from nybble.training.build import train_model
from nybble.units import format_seconds

_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # the rates that are tried for adapters
_SHARE = 0.15  # the largest part of the run's work that the probe may take
_SHARE_JUDGING = 0.03  # the part of it that the held-out rows may take
_LEAST_STEPS = 3


@dataclass(frozen=True)
class Branch:
    """One rate and how well it did."""

    learning_rate: float
    loss: float | None  # on the held-out rows used, in nats per learned token; None: not finite


@dataclass(frozen=True)
class Probe:
    """The result of a probe; `probe` in run.json, and probe.json."""

    learning_rate: float
    branches: tuple[Branch, ...]
    steps: int  # optimizer steps of each branch
    n_rows: int  # held-out rows that the rates are judged on
    share: float  # the part of the run's work, where a forward pass counts as a third of a step
    seconds: float

    @property
    def in_words(self) -> str:
        """The rate, the loss of each branch, and what the probe cost."""
        curve = ", ".join(
            f"{b.learning_rate:g}: {'diverged' if b.loss is None else f'{b.loss:.4f}'}" for b in self.branches
        )
        edge = "; the best may lie beyond what was tried" if self.is_at_edge else ""
        return (
            f"learning rate {self.learning_rate:g} by probe ({curve}){edge}; {self.steps} steps each, "
            f"{self.n_rows} held-out rows, {100 * self.share:.1f} % of the run's work, {format_seconds(self.seconds)}"
        )

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate may lie outside those that were tried."""
        return self.learning_rate in (self.branches[0].learning_rate, self.branches[-1].learning_rate)


@dataclass(frozen=True)
class Judge:
    """Decides between rates."""

    method: str
    held_out: Sequence[Example]
    evaluate: Callable[[Sequence[Example]], Evaluation | None]

    @property
    def rates(self) -> Sequence[float]:
        """The rates to try: training all parameters works best at about a tenth of the rate of adapters."""
        return tuple(rate / 10 for rate in _RATES) if self.method == "full" else _RATES


def probe_rates(
    model: Any,
    tokenizer: Any,
    groups: Groups,
    section: TrainingSection,
    judge: Judge,
    *,
    run: RunDirectory,
    max_steps: int,
    is_resumed: bool = False,
    observer: Observer | None = None,
    **parts: Any,
) -> Probe:
    """Try each rate from the weights that `model` has now; they are the same afterwards.

    The result is written to probe.json: a resumed run continues with the rate that it began with.

    Args:
        model: is trained in place and put back.
        tokenizer: of the model.
        groups: rows, which are drawn group by group.
        section: of the run.
        judge: decides between the rates.
        run: takes probe.json.
        max_steps: of the run; a branch has a small share of them.
        is_resumed: the run continues from a checkpoint.
        observer: receives the progress of the probe.
        parts: as `build` takes them, e.g. `device` and `compute_dtype`.

    Raises:
        RecipeError: the run is too short to probe, or nothing is held out.
        InputError: the loss is not finite at any rate.
    """
    observer = observer or Silent()
    kept = run.path / "probe.json"
    if is_resumed and kept.is_file():
        former = json.loads(kept.read_text(encoding="utf-8"))
        return Probe(**{**former, "branches": tuple(Branch(**branch) for branch in former["branches"])})
    steps, rows = _within_share(groups, section, max_steps, judge)
    began = time.monotonic()
    start = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    branches: list[Branch] = []
    judged: list[Sums | None] = []
    for number, rate in enumerate(judge.rates):
        observer.progress("probing learning rates", number, len(judge.rates))
        own = section.model_copy(
            update={
                "learning_rate": rate,
                "logging_steps": 1,
                "parity_steps": 0,
                "report_to": "none",
                "bad_batch": "stop",
                "grad_spike": 0.0,
            }
        )
        is_finite = _branch(model, tokenizer, groups, own, {**parts, "max_steps": steps})
        found = judge.evaluate(rows) if is_finite else None
        _put_back(model, start)
        if found is None or not math.isfinite(found.loss):
            branches.append(Branch(rate, None))
            judged.append(None)
        else:
            branches.append(Branch(rate, found.loss))
            judged.append(Sums([row.loss for row in found.rows], [row.n_tokens for row in found.rows]))
    observer.progress("probing learning rates", len(judge.rates), len(judge.rates))
    chosen = _lowest_of_the_best(branches, judged)
    tokens = len(judge.rates) * (steps * _tokens_per_step(groups, section) + sum(len(e.input_ids) for e in rows) / 3)
    share = tokens / (max_steps * _tokens_per_step(groups, section))
    probe = Probe(chosen, tuple(branches), steps, len(rows), share, time.monotonic() - began)
    write_text(kept, to_json(asdict(probe)))
    return probe


def _within_share(groups: Groups, section: TrainingSection, n_steps: int, judge: Judge) -> tuple[int, list[Example]]:
    """Steps of a branch and the rows that judge it."""
    if not judge.held_out:
        raise RecipeError("learning_rate: probe judges by held-out rows and there are none; raise --eval_fraction")
    n_rates = len(judge.rates)
    steps = int((_SHARE - _SHARE_JUDGING) * n_steps / n_rates)
    if steps < _LEAST_STEPS:
        needed = math.ceil(_LEAST_STEPS * n_rates / (_SHARE - _SHARE_JUDGING))
        raise RecipeError(
            f"learning_rate: probe would take more than {_SHARE:.0%} of a run of {n_steps} steps; "
            f"give a rate, or train {needed} steps or more"
        )
    room = 3 * _SHARE_JUDGING * n_steps * _tokens_per_step(groups, section) / n_rates  # forward: a third of a step
    chosen: list[Example] = []
    for example in random.Random(section.seed).sample(list(judge.held_out), len(judge.held_out)):
        room -= len(example.input_ids)
        if room < 0 and len(chosen) >= 2:
            break
        # Answers are not generated: that would cost more than the branch.
        chosen.append(replace(example, answer=None))
    return steps, chosen


def _tokens_per_step(groups: Groups, section: TrainingSection) -> float:
    total = sum(len(example["input_ids"]) for group in groups for example in group)
    return total / len(groups) * section.per_device_train_batch_size * section.gradient_accumulation_steps


def _branch(model: Any, tokenizer: Any, groups: Groups, section: TrainingSection, parts: dict[str, Any]) -> bool:
    """Train a branch in place, leaving nothing on disk; False where its loss is not finite."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_model(model, tokenizer, groups, section, run=RunDirectory(Path(folder)), **parts)
        except StoppedError as error:
            raise StoppedError("stopped while probing learning rates; start over with --overwrite") from error
        except InputError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
    return True


def _put_back(model: Any, start: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


def _lowest_of_the_best(branches: Sequence[Branch], judged: Sequence[Sums | None]) -> float:
    known = [(b.loss, number) for number, b in enumerate(branches) if b.loss is not None]
    if not known:
        raise InputError("the loss is not a number at any probed learning rate; look at the rows, or give a rate")
    best = judged[min(known)[1]]
    for branch, sums in zip(branches, judged, strict=True):
        if sums is None or best is None:
            continue
        apart = interval([sums.minus(best)])
        if sums is best or (apart is not None and apart.within_noise):
            return branch.learning_rate
    raise AssertionError("the best rate is one of the branches")
