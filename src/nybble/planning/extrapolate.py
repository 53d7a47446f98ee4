"""What a step takes at any level, extrapolated from a few traced layers.

Levels 0 to n recompute that many of the n decoder layers. The levels beyond recompute all of them and apply the savers
of `nybble.models.memory_savers`, one more at each level.

Decoder layers of a kind are alike, so at a given place of a step (a layer's forward pass, the loss, a layer's backward
pass) the bytes alive are a linear function of how many layers of each kind, recomputed or not, lie before it and behind
it. A trace of the first and the last layer of each kind holds every place where a peak can be; traces with one more
layer of one kind give the function's slopes (`nybble.planning.chosen_layers`). All layers recomputed and none are cases
of their own, since the first layer, whose input needs no gradient, is then of the other kind.
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
    bare_model,
    blocks_of,
    count_parameters,
    decoder_layers,
    kinds_of_layers,
    materialize,
    meta_model,
    recomputable_layers,
    same_in_every_layer,
    with_layers,
)
from nybble.nn.workspace import workspace
from nybble.planning.chosen_layers import Chosen, chosen, extrapolated
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
        """The same with another recipe or config, and with the traces so far where they hold for the same model."""
        other = replace(self, **changes)
        return other if self._what_is_built == other._what_is_built else replace(other, traces={})

    @property
    def _what_is_built(self) -> tuple[Any, ...]:
        """All that `meta_model` makes the model of."""
        recipe = self.recipe
        return (self.config, recipe.method, recipe.model, recipe.quantization, recipe.lora, recipe.preferences)

    @cached_property
    def _bare(self) -> Any:
        """The whole base, without weights."""
        return bare_model(self.config, self.recipe, self.dtype)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each decoder layer."""
        return kinds_of_layers(decoder_layers(self._bare))

    @cached_property
    def n_layers(self) -> int:
        """The number of decoder layers that can be recomputed: all or none."""
        return len(self.kinds) if len(recomputable_layers(self._bare)) == len(self.kinds) else 0

    @cached_property
    def largest_weight(self) -> int:
        """Elements of the largest weight in a decoder layer that is read or merged in one piece."""
        weights = (p for layer in decoder_layers(self._bare) for p in layer.parameters() if p.ndim == 2)
        return max((weight.numel() for weight in weights), default=0)

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
        model = self._model(self.evaluated.layers)
        return model, MemorySavers(model)

    @cached_property
    def _alike(self) -> tuple[Recipe, bool]:
        """The recipe with the adapters of the largest layer on every layer, and whether its own are that anyway."""
        if self.recipe.method == "full":
            return self.recipe, True
        lora, are_alike = same_in_every_layer(self._bare, self.recipe.lora)
        return self.recipe.model_copy(update={"lora": lora}), are_alike

    def _model(self, layers: Sequence[int]) -> Any:
        """The model with those of its layers, on the meta device."""
        recipe = self.recipe if len(layers) == len(self.kinds) else self._alike[0]
        bare = with_layers(self._bare, decoder_layers(self._bare), layers)
        return meta_model(self.config, recipe, self.dtype, bare)

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Trainable and all parameters of the whole model."""
        if not self._alike[1]:
            return count_parameters(self._model(range(len(self.kinds))))
        few = self.evaluated
        base = count_parameters(self._model(few.layers))
        more = [(one.n_left, count_parameters(self._model(one.layers))) for one in few.more]
        trainable, total = (base[i] + sum(n * (counts[i] - base[i]) for n, counts in more) for i in (0, 1))
        return trainable, total

    @cached_property
    def evaluated(self) -> Chosen:
        """The layers that are traced for an evaluated batch."""
        return chosen(self.kinds, 0)

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
        layers: Sequence[int],
        n_recomputed: int,
        savers: Sequence[str] = (),
        begin: Reused | None = None,
    ) -> tuple[StepCost, Reused]:
        """A later step of the model with those of its layers, and the reused memory after it.

        The next may `begin` with that; without it an earlier step is traced too.
        """

        def steps(live: MemoryTracer, model: Any, batch: dict[str, Any]) -> tuple[StepCost, Reused]:
            model_savers = MemorySavers(model)
            model_savers.apply(savers)
            n_steps = 2 if begin is None else 1
            done = run_steps(live, model, batch, n_recomputed, self.dtype, n_steps, model_savers)
            return done[-1], reused()

        found: tuple[StepCost, Reused] = self._run(layers, rows, steps, begin or ())
        return found

    def trace_evaluation(self, rows: BatchShape, layers: Sequence[int]) -> StepCost:
        """What one evaluated batch takes in the model with those of its layers."""

        def pass_once(live: MemoryTracer, model: Any, batch: dict[str, Any]) -> StepCost:
            return run_evaluation(live, model, batch, self.dtype)

        key = (rows, tuple(layers))
        if key not in self.traces:
            self.traces[key] = self._run(layers, rows, pass_once)
        return self.traces[key]

    def _run(self, layers: Sequence[int], rows: BatchShape, work: Callable[..., Any], begin: Reused = ()) -> Any:
        model = self._model(layers)
        batch = batch_of(model, rows, by_answer=self.recipe.preferences.objective != "sft")
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
        # Of layers that wait on the host, the highest is one between: two lie on the device.
        few = chosen(self.setting.kinds, depth, 3 if savers else 2)
        base = self._trace(few.layers, few.n_recomputed, savers)
        return extrapolated(few, base, [self._trace(one.layers, one.n_recomputed, savers) for one in few.more])

    def _trace(self, layers: tuple[int, ...], n_recomputed: int, savers: tuple[str, ...]) -> StepCost:
        kinds = tuple(self.setting.kinds[number] for number in layers)
        key, found = (self.rows, kinds, n_recomputed, savers), self.setting.traces
        if key not in found:
            # At the last level no memory is reused.
            begin = () if "slices" in savers else self._reused
            work, left = self.setting.trace(self.rows, layers, n_recomputed, savers, begin)
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
    few = setting.evaluated
    base = setting.trace_evaluation(rows, few.layers)
    return setting.here(extrapolated(few, base, [setting.trace_evaluation(rows, one.layers) for one in few.more]))
