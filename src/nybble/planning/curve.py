"""What a step takes at any depth of recomputation, from a few traced layers.

Decoder layers are alike, so at a given place of a step (a layer's forward pass, the loss, a layer's backward pass) the
bytes alive are a linear function of the number of recomputed layers before it and of those that keep everything. Three
small traces fix that function for each place; the peak is the largest of them. All layers recomputed and none are
cases of their own, since the first layer, whose input needs no gradient, is then of the other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nybble.data.batches import filled
from nybble.models import blocks_of, count_parameters
from nybble.nn.scratch import scratch
from nybble.planning.live import LiveTensors, Peak
from nybble.planning.step import (
    Reused,
    Rows,
    Work,
    adopt,
    batch_of,
    build,
    config_with,
    fill,
    reused,
    reusing,
    run_evaluation,
    run_steps,
)
from nybble.recipe import Recipe

_FEW = 4  # up to so many layers are traced as they are


@dataclass(frozen=True)
class Setting:
    """What is traced: all that memory depends on but the batch."""

    config: Any  # transformers' config, of all layers
    recipe: Recipe
    dtype: torch.dtype
    rounding: int = 1  # of the device's allocator, bytes

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def laid_out(self, rows: Rows) -> int:
        """Tokens that go through the model: those of the rows, filled up, or padded where rows lie side by side."""
        return filled(rows.tokens) if self._is_flat else max(rows.lengths) * len(rows.lengths)

    @cached_property
    def _is_flat(self) -> bool:
        return blocks_of(build(config_with(self.config, 1), self.recipe, self.dtype)).flattened

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Trainable and all parameters of the whole model."""
        few = (build(config_with(self.config, n), self.recipe, self.dtype) for n in (2, 3))
        (t2, a2), (t3, a3) = (count_parameters(model) for model in few)
        return t2 + (self.n_layers - 2) * (t3 - t2), a2 + (self.n_layers - 2) * (a3 - a2)

    def trace(self, rows: Rows, n_layers: int, n_recomputed: int, begin: Reused | None = None) -> tuple[Work, Reused]:
        """A later step of the model with so many layers, and the reused memory after it, which the next may `begin`
        with; without it an earlier step is traced too.
        """

        def steps(live: LiveTensors, model: Any, batch: dict[str, Any]) -> tuple[Work, Reused]:
            n_steps = 2 if begin is None else 1
            done = run_steps(live, model, self.recipe, batch, n_recomputed, self.dtype, n_steps)
            return done[-1], reused()

        found: tuple[Work, Reused] = self._run(n_layers, rows, steps, begin or ())
        return found

    def trace_evaluation(self, rows: Rows, n_layers: int) -> Work:
        """One evaluated batch of the model with so many layers."""

        def pass_once(live: LiveTensors, model: Any, batch: dict[str, Any]) -> Work:
            return run_evaluation(live, model, batch, self.dtype)

        found: Work = self._run(n_layers, rows, pass_once)
        return found

    def _run(self, n_layers: int, rows: Rows, work: Callable[..., Any], begin: Reused = ()) -> Any:
        model = build(config_with(self.config, n_layers), self.recipe, self.dtype)
        batch = batch_of(model, rows)
        with FakeTensorMode(), reusing(begin):
            fill(model)
            live = LiveTensors(self.rounding)
            adopt(live, model)
            live.adopt(scratch.pieces(), "workspace")
            return work(live, model, batch)


class Curve:
    """A step over one batch, at any depth."""

    def __init__(self, setting: Setting, rows: Rows) -> None:
        self.setting, self.rows = setting, rows
        self._found: dict[tuple[int, int], Work] = {}
        self._reused: Reused | None = None

    def first(self, depth: int) -> Work:
        """The first step: as later ones, but for the optimizer's state, which only its update makes."""
        later = self.steady(depth)
        peaks = {name: peak if name == "update" else _without_state(peak) for name, peak in later.peaks.items()}
        return replace(later, peaks=peaks)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Peak of a later step for each depth, bytes."""
        return tuple(self.steady(depth).peak.total_bytes for depth in range(self.setting.n_layers + 1))

    def steady(self, depth: int) -> Work:
        """A later step."""
        n = self.setting.n_layers
        recomputed, kept = depth, n - depth
        if n <= _FEW:
            return self._trace(recomputed, kept)
        if not recomputed:
            return _line(self._trace(0, 2), [(kept - 2, self._trace(0, 3))])
        if not kept:
            return _line(self._trace(2, 0), [(recomputed - 2, self._trace(3, 0))])
        more = [(recomputed - 2, self._trace(3, 2)), (kept - 2, self._trace(2, 3))]
        return _line(self._trace(2, 2), more)

    def _trace(self, recomputed: int, kept: int) -> Work:
        if (recomputed, kept) not in self._found:
            work, self._reused = self.setting.trace(self.rows, recomputed + kept, recomputed, self._reused)
            self._found[recomputed, kept] = work
        return self._found[recomputed, kept]


def _without_state(peak: Peak) -> Peak:
    parts = {**peak.parts, "optimizer": 0}
    return Peak(sum(parts.values()), parts)


def evaluation(setting: Setting, rows: Rows) -> Work:
    """One evaluated batch of the whole model."""
    if setting.n_layers <= _FEW:
        return setting.trace_evaluation(rows, setting.n_layers)
    base, more = (setting.trace_evaluation(rows, n) for n in (2, 3))
    return _line(base, [(setting.n_layers - 2, more)])


def _line(base: Work, steps: list[tuple[int, Work]]) -> Work:
    """`base` plus n times what each of `steps` has more than it."""

    def at(of: Callable[[Work], int]) -> int:
        return of(base) + sum(n * (of(work) - of(base)) for n, work in steps)

    def each(of: Callable[[Work], Mapping[str, int]]) -> dict[str, int]:
        return {part: at(lambda work, part=part: of(work).get(part, 0)) for part in of(base)}  # type: ignore[misc]

    peaks = {}
    for name in base.peaks:
        if all(name in work.peaks for _, work in steps):
            parts = each(lambda work, name=name: work.peaks[name].parts)  # type: ignore[misc]
            peaks[name] = Peak(sum(parts.values()), parts)
    return Work(peaks, at(lambda w: w.flops), at(lambda w: w.moved_bytes), each(lambda w: w.rest))
