"""What a step takes at any level, from a few traced layers.

Level 0 .. n is so many of the n decoder layers recomputed; the levels beyond recompute all and go down the ladder of
`nybble.models.lean`, a rung each.

Decoder layers are alike, so at a given place of a step (a layer's forward pass, the loss, a layer's backward pass) the
bytes alive are a linear function of the number of recomputed layers before it and of those that keep everything. Three
small traces fix that function for each place; the peak is the largest of them. All layers recomputed and none are
cases of their own, since the first layer, whose input needs no gradient, is then of the other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nybble.data.batches import filled
from nybble.models import Ladder, blocks_of, config_with_layers, count_parameters, materialize, meta_model
from nybble.nn.scratch import scratch
from nybble.planning.live import LiveTensors, Peak
from nybble.planning.shards import Shards, Sizes
from nybble.planning.step import (
    Reused,
    Rows,
    Work,
    adopt,
    batch_of,
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
    shares_memory: bool = False  # the device, with the host
    n_processes: int = 1  # that share the model, in shards
    host_embedding: bool = False  # the embedding table lies on the host: a rung of its own, for all batches
    traces: dict[Any, Work] = field(default_factory=dict, repr=False, compare=False)  # of whole models

    def of(self, **changes: Any) -> Setting:
        """With another recipe or config, so that nothing traced holds."""
        return replace(self, traces={}, **changes)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def laid_out(self, rows: Rows) -> int:
        """Tokens that go through the model: those of the rows, filled up, or padded where rows lie side by side."""
        return filled(rows.tokens) if self._is_flat else max(rows.lengths) * len(rows.lengths)

    @cached_property
    def rungs(self) -> tuple[str, ...]:
        """Those of the ladder that the model has and the device gains from."""
        training = self.recipe.training
        without = training.lean == "never" or (training.lean, training.gradient_checkpointing) == ("auto", "never")
        if without or self.shards:
            return ()
        return self._small[1].gaining(self.shares_memory)

    @cached_property
    def lean(self) -> tuple[tuple[str, ...], ...]:
        """Rungs of the levels beyond full recomputation."""
        rungs = [rung for rung in self.rungs if rung != "embedding"]
        return tuple(tuple(rungs[: n + 1]) for n in range(len(rungs)))

    @property
    def table_bytes(self) -> int:
        """Of the embedding, if it lies on the host."""
        text = self.config.get_text_config()
        return text.vocab_size * text.hidden_size * self.dtype.itemsize if self.host_embedding else 0

    @property
    def _is_flat(self) -> bool:
        return blocks_of(self._small[0]).flattened

    @cached_property
    def _small(self) -> tuple[Any, Ladder]:
        model = meta_model(config_with_layers(self.config, 1), self.recipe, self.dtype)
        return model, Ladder(model)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Trainable and all parameters of the whole model."""
        few = (meta_model(config_with_layers(self.config, n), self.recipe, self.dtype) for n in (2, 3))
        (t2, a2), (t3, a3) = (count_parameters(model) for model in few)
        return t2 + (self.n_layers - 2) * (t3 - t2), a2 + (self.n_layers - 2) * (a3 - a2)

    @cached_property
    def shards(self) -> Shards | None:
        """What one process holds and gathers; None: all, and nothing."""
        if self.n_processes == 1:
            return None
        sizes = Sizes.of(self.config, self.recipe, self.dtype)
        return Shards(self.n_processes, sizes, self.recipe.training.fsdp_cpu_offload)

    def here(self, work: Work) -> Work:
        """`work` of the whole model, as it is in one process on its device."""
        work = _without_table(work, self.table_bytes)
        return self.shards.of(work) if self.shards else work

    def trace(
        self, rows: Rows, n_layers: int, n_recomputed: int, rungs: Sequence[str] = (), begin: Reused | None = None
    ) -> tuple[Work, Reused]:
        """A later step of the model with so many layers, and the reused memory after it, which the next may `begin`
        with; without it an earlier step is traced too.
        """

        def steps(live: LiveTensors, model: Any, batch: dict[str, Any]) -> tuple[Work, Reused]:
            ladder = Ladder(model)
            ladder.take(rungs)
            n_steps = 2 if begin is None else 1
            done = run_steps(live, model, batch, n_recomputed, self.dtype, n_steps, ladder)
            return done[-1], reused()

        found: tuple[Work, Reused] = self._run(n_layers, rows, steps, begin or ())
        return found

    def trace_evaluation(self, rows: Rows, n_layers: int) -> Work:
        """One evaluated batch of the model with so many layers."""

        def pass_once(live: LiveTensors, model: Any, batch: dict[str, Any]) -> Work:
            return run_evaluation(live, model, batch, self.dtype)

        if (rows, n_layers) not in self.traces:
            self.traces[rows, n_layers] = self._run(n_layers, rows, pass_once)
        return self.traces[rows, n_layers]

    def _run(self, n_layers: int, rows: Rows, work: Callable[..., Any], begin: Reused = ()) -> Any:
        model = meta_model(config_with_layers(self.config, n_layers), self.recipe, self.dtype)
        batch = batch_of(model, rows)
        with FakeTensorMode(), reusing(begin):
            materialize(model)
            live = LiveTensors(self.rounding)
            adopt(live, model)
            live.adopt(scratch.pieces(), "workspace")
            return work(live, model, batch)


class Curve:
    """A step over one batch, at any level."""

    def __init__(self, setting: Setting, rows: Rows) -> None:
        self.setting, self.rows = setting, rows
        self._reused: Reused | None = None

    def first(self, level: int) -> Work:
        """The first step: as later ones, but for the optimizer's state, which only its update makes."""
        later = self.steady(level)
        peaks = {name: peak if name == "update" else _without_state(peak) for name, peak in later.peaks.items()}
        return replace(later, peaks=peaks)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Peak of a later step for each number of recomputed layers, bytes."""
        return tuple(self.steady(depth).peak.total_bytes for depth in range(self.setting.n_layers + 1))

    def steady(self, level: int) -> Work:
        """A later step."""
        n = self.setting.n_layers
        rungs = self.setting.lean[level - n - 1] if level > n else ()
        return self.setting.here(self._steady(min(level, n), rungs))

    def _steady(self, depth: int, rungs: tuple[str, ...]) -> Work:
        n = self.setting.n_layers
        recomputed, kept = depth, n - depth
        if n <= _FEW:
            return self._trace(recomputed, kept, rungs)
        if not recomputed:
            return _line(self._trace(0, 2), [(kept - 2, self._trace(0, 3))])
        if rungs:  # of layers that wait on the host, the highest is one between: two lie on the device
            return _line(self._trace(3, 0, rungs), [(recomputed - 3, self._trace(4, 0, rungs))])
        if not kept:
            return _line(self._trace(2, 0), [(recomputed - 2, self._trace(3, 0))])
        more = [(recomputed - 2, self._trace(3, 2)), (kept - 2, self._trace(2, 3))]
        return _line(self._trace(2, 2), more)

    def _trace(self, recomputed: int, kept: int, rungs: tuple[str, ...] = ()) -> Work:
        key, found = (self.rows, recomputed, kept, rungs), self.setting.traces
        if key not in found:
            # Under the last rung no memory is reused.
            begin = () if "slices" in rungs else self._reused
            work, left = self.setting.trace(self.rows, recomputed + kept, recomputed, rungs, begin)
            found[key] = work
            self._reused = left or self._reused
        return found[key]


def _without_table(work: Work, n_bytes: int) -> Work:
    """With so many bytes of weights on the host."""
    if not n_bytes:
        return work

    def less(parts: Mapping[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - n_bytes}

    peaks = {name: Peak(peak.total_bytes - n_bytes, less(peak.parts)) for name, peak in work.peaks.items()}
    return replace(work, peaks=peaks, rest=less(work.rest), host_bytes=work.host_bytes + n_bytes)


def _without_state(peak: Peak) -> Peak:
    parts = {**peak.parts, "optimizer": 0}
    return Peak(sum(parts.values()), parts)


def evaluation(setting: Setting, rows: Rows) -> Work:
    """One evaluated batch of the whole model."""
    if setting.n_layers <= _FEW:
        return setting.here(setting.trace_evaluation(rows, setting.n_layers))
    base, more = (setting.trace_evaluation(rows, n) for n in (2, 3))
    return setting.here(_line(base, [(setting.n_layers - 2, more)]))


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
    return Work(
        peaks,
        at(lambda w: w.flops),
        at(lambda w: w.moved_bytes),
        at(lambda w: w.operators),
        each(lambda w: w.rest),
        at(lambda w: w.host_bytes),
    )
