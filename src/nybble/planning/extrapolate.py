"""What a step takes at any level, extrapolated from a few traced layers.

Levels 0 to n recompute that many of the n decoder layers. The levels beyond recompute all of them and apply the savers
of `nybble.models.memory_savers`, one more at each level.

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
from nybble.models import (
    MemorySavers,
    SwapReport,
    blocks_of,
    config_with_layers,
    count_parameters,
    materialize,
    meta_model,
    model_without_weights,
    same_in_every_layer,
)
from nybble.nn.workspace import workspace
from nybble.planning.memory_tracer import MemoryTracer, Peak
from nybble.planning.sharded_memory import Shards, Sizes
from nybble.planning.traced_step import (
    BatchShape,
    Reused,
    StepCost,
    adopt,
    batch_of,
    reused,
    reusing,
    run_evaluation,
    run_steps,
)
from nybble.recipe import Recipe

_FEW = 4  # up to this number of layers, a model is traced as it is


@dataclass(frozen=True)
class TracedModel:
    """The model as it is traced: everything that memory depends on except the batch."""

    config: Any  # transformers' config, of all layers
    recipe: Recipe
    dtype: torch.dtype
    rounding: int = 1  # of the device's allocator, bytes
    shares_memory: bool = False  # the device, with the host
    n_processes: int = 1  # that share the model, in shards
    host_embedding: bool = False  # the embedding table is on the host: a saver of its own, for all batches
    traces: dict[Any, StepCost] = field(default_factory=dict, repr=False, compare=False)  # of whole models

    def of(self, **changes: Any) -> TracedModel:
        """The same with another recipe or config, without the traces so far, which would not hold."""
        return replace(self, traces={}, **changes)

    @property
    def n_layers(self) -> int:
        """The number of decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def laid_out(self, rows: BatchShape) -> int:
        """Tokens that go through the model for `rows`: flattened and filled up, or padded to the longest row."""
        if not self.blocks.flattened:
            return max(rows.padded) * len(rows.padded)
        return filled(rows.tokens if self.blocks.trees else sum(rows.padded))

    @cached_property
    def savers(self) -> tuple[str, ...]:
        """The memory savers that the recipe allows, the model has and the device gains from."""
        training = self.recipe.training
        without = training.lean == "never" or (training.lean, training.gradient_checkpointing) == ("auto", "never")
        if without or self.shards:
            return ()
        return self._small[1].useful_on(self.shares_memory)

    @cached_property
    def saver_levels(self) -> tuple[tuple[str, ...], ...]:
        """The memory savers of each level beyond full recomputation."""
        savers = [saver for saver in self.savers if saver != "embedding"]
        return tuple(tuple(savers[: n + 1]) for n in range(len(savers)))

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding table if it is on the host, else 0."""
        text = self.config.get_text_config()
        return text.vocab_size * text.hidden_size * self.dtype.itemsize if self.host_embedding else 0

    @property
    def blocks(self) -> SwapReport:
        """What Nybble computes of the model; counts are those of its first layer."""
        return blocks_of(self._small[0])

    @cached_property
    def _small(self) -> tuple[Any, MemorySavers]:
        model = self._model(1)
        return model, MemorySavers(model)

    @cached_property
    def _alike(self) -> tuple[Recipe, bool]:
        """The recipe with the adapters of the largest layer on every layer, and whether its own are that anyway."""
        if self.recipe.method == "full":
            return self.recipe, True
        config = config_with_layers(self.config, self.n_layers)
        whole = model_without_weights(config, trust_remote_code=self.recipe.model.trust_remote_code)
        lora, are_alike = same_in_every_layer(whole, self.recipe.lora)
        return self.recipe.model_copy(update={"lora": lora}), are_alike

    def _model(self, n_layers: int) -> Any:
        """The model with so many of its layers, on the meta device."""
        recipe = self.recipe if n_layers == self.n_layers else self._alike[0]
        return meta_model(config_with_layers(self.config, n_layers), recipe, self.dtype, self.config)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Trainable and all parameters of the whole model."""
        if not self._alike[1]:
            return count_parameters(self._model(self.n_layers))
        (t2, a2), (t3, a3) = (count_parameters(self._model(n)) for n in (2, 3))
        return t2 + (self.n_layers - 2) * (t3 - t2), a2 + (self.n_layers - 2) * (a3 - a2)

    @cached_property
    def shards(self) -> Shards | None:
        """What one of several processes holds and gathers; None where each holds the whole model."""
        if self.n_processes == 1:
            return None
        sizes = Sizes.of(self.config, self._alike[0], self.dtype)
        return Shards(self.n_processes, sizes, self.recipe.training.fsdp_cpu_offload)

    def here(self, work: StepCost) -> StepCost:
        """The share of `work`, which is that of the whole model, that falls to one process on its device."""
        work = _without_table(work, self.table_bytes)
        return self.shards.of(work) if self.shards else work

    def trace(
        self,
        rows: BatchShape,
        n_layers: int,
        n_recomputed: int,
        savers: Sequence[str] = (),
        begin: Reused | None = None,
    ) -> tuple[StepCost, Reused]:
        """A later step of the model with so many layers, and the reused memory after it, which the next may `begin`
        with; without it an earlier step is traced too.
        """

        def steps(live: MemoryTracer, model: Any, batch: dict[str, Any]) -> tuple[StepCost, Reused]:
            model_savers = MemorySavers(model)
            model_savers.apply(savers)
            n_steps = 2 if begin is None else 1
            done = run_steps(live, model, batch, n_recomputed, self.dtype, n_steps, model_savers)
            return done[-1], reused()

        found: tuple[StepCost, Reused] = self._run(n_layers, rows, steps, begin or ())
        return found

    def trace_evaluation(self, rows: BatchShape, n_layers: int) -> StepCost:
        """What one evaluated batch takes in the model with `n_layers` layers."""

        def pass_once(live: MemoryTracer, model: Any, batch: dict[str, Any]) -> StepCost:
            return run_evaluation(live, model, batch, self.dtype)

        if (rows, n_layers) not in self.traces:
            self.traces[rows, n_layers] = self._run(n_layers, rows, pass_once)
        return self.traces[rows, n_layers]

    def _run(self, n_layers: int, rows: BatchShape, work: Callable[..., Any], begin: Reused = ()) -> Any:
        model = self._model(n_layers)
        batch = batch_of(model, rows)
        with FakeTensorMode(), reusing(begin):
            materialize(model)
            live = MemoryTracer(self.rounding)
            adopt(live, model)
            live.adopt(workspace.pieces(), "workspace")
            return work(live, model, batch)


class StepAtLevels:
    """What a step over one batch takes, at any level."""

    def __init__(self, setting: TracedModel, rows: BatchShape) -> None:
        self.setting, self.rows = setting, rows
        self._reused: Reused | None = None

    def first(self, level: int) -> StepCost:
        """The first step of a training, in which the optimizer's state appears only with the update."""
        later = self.steady(level)
        peaks = {name: peak if name == "update" else _without_state(peak) for name, peak in later.peaks.items()}
        return replace(later, peaks=peaks)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Peak bytes of a step after the first, for each number of recomputed layers."""
        return tuple(self.steady(depth).peak.total_bytes for depth in range(self.setting.n_layers + 1))

    def steady(self, level: int) -> StepCost:
        """Any step after the first."""
        n = self.setting.n_layers
        savers = self.setting.saver_levels[level - n - 1] if level > n else ()
        return self.setting.here(self._steady(min(level, n), savers))

    def _steady(self, depth: int, savers: tuple[str, ...]) -> StepCost:
        n = self.setting.n_layers
        recomputed, kept = depth, n - depth
        if n <= _FEW:
            return self._trace(recomputed, kept, savers)
        if not recomputed:
            return _line(self._trace(0, 2), [(kept - 2, self._trace(0, 3))])
        if savers:  # of layers that wait on the host, the highest is one between: two lie on the device
            return _line(self._trace(3, 0, savers), [(recomputed - 3, self._trace(4, 0, savers))])
        if not kept:
            return _line(self._trace(2, 0), [(recomputed - 2, self._trace(3, 0))])
        more = [(recomputed - 2, self._trace(3, 2)), (kept - 2, self._trace(2, 3))]
        return _line(self._trace(2, 2), more)

    def _trace(self, recomputed: int, kept: int, savers: tuple[str, ...] = ()) -> StepCost:
        key, found = (self.rows, recomputed, kept, savers), self.setting.traces
        if key not in found:
            # At the last level no memory is reused.
            begin = () if "slices" in savers else self._reused
            work, left = self.setting.trace(self.rows, recomputed + kept, recomputed, savers, begin)
            found[key] = work
            self._reused = left or self._reused
        return found[key]


def _without_table(work: StepCost, n_bytes: int) -> StepCost:
    """The same work with `n_bytes` of the weights on the host."""
    if not n_bytes:
        return work

    def less(parts: Mapping[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - n_bytes}

    peaks = {name: Peak(peak.total_bytes - n_bytes, less(peak.parts)) for name, peak in work.peaks.items()}
    return replace(work, peaks=peaks, rest=less(work.rest), host_bytes=work.host_bytes + n_bytes)


def _without_state(peak: Peak) -> Peak:
    parts = {**peak.parts, "optimizer": 0}
    return Peak(sum(parts.values()), parts)


def evaluation(setting: TracedModel, rows: BatchShape) -> StepCost:
    """What one evaluated batch of the whole model takes."""
    if setting.n_layers <= _FEW:
        return setting.here(setting.trace_evaluation(rows, setting.n_layers))
    base, more = (setting.trace_evaluation(rows, n) for n in (2, 3))
    return setting.here(_line(base, [(setting.n_layers - 2, more)]))


def _line(base: StepCost, steps: list[tuple[int, StepCost]]) -> StepCost:
    """`base` plus, for each pair in `steps`, n times the difference between its cost and that of `base`."""

    def at(of: Callable[[StepCost], int]) -> int:
        return of(base) + sum(n * (of(work) - of(base)) for n, work in steps)

    def each(of: Callable[[StepCost], Mapping[str, int]]) -> dict[str, int]:
        return {part: at(lambda work, part=part: of(work).get(part, 0)) for part in of(base)}  # type: ignore[misc]

    peaks = {}
    for name in base.peaks:
        if all(name in work.peaks for _, work in steps):
            parts = each(lambda work, name=name: work.peaks[name].parts)  # type: ignore[misc]
            peaks[name] = Peak(sum(parts.values()), parts)
    return StepCost(
        peaks,
        at(lambda w: w.flops),
        at(lambda w: w.moved_bytes),
        at(lambda w: w.operators),
        each(lambda w: w.rest),
        at(lambda w: w.host_bytes),
    )
