"""The phases of a run and what each takes, for one recipe on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nybble.data import Prepared
from nybble.data.store import Examples
from nybble.planning.devices import Profile
from nybble.planning.extrapolate import StepAtLevels, TracedModel, evaluation
from nybble.planning.memory_tracer import Peak
from nybble.planning.traced_step import BatchShape, StepCost
from nybble.recipe import PhasePlan, Recipe, StepMemory, saving_pace
from nybble.training.reference import SCORED_TOKENS

_SMALL = BatchShape((16,))  # where the curve over tokens begins
_NOT_TRACED = 1 << 62  # bytes: more than there is room for
# Bytes of optimizer state for each trained parameter, by a word in the optimizer's name; AdamW has 8.
_STATES = {"8bit": 2.03, "4bit": 1.06, "adafactor": 0.05, "lion": 4.0, "sgd": 0.0, "rmsprop": 4.0, "adagrad": 4.0}


@dataclass(frozen=True)
class Batches:
    """The batches that a plan is made for."""

    average: BatchShape
    longest: BatchShape
    evaluation: BatchShape
    n_rows: int | None = None  # rows to train on; None: not known

    @classmethod
    def full(cls, recipe: Recipe) -> Batches:
        """Batches in which every row has `max_length` tokens."""
        length, section = recipe.data.max_length, recipe.training
        batch = BatchShape((length,) * section.per_device_train_batch_size)
        return cls(batch, batch, BatchShape((length,) * recipe.evaluation.per_device_eval_batch_size))

    @classmethod
    def of(cls, prepared: Prepared, packs: Sequence[Sequence[int]] | None, recipe: Recipe) -> Batches:
        """Batches of the rows themselves: their mean, the longest that could meet, and the longest held out.

        Rows that are packed together count as one.
        """
        drawn = _drawn(prepared.train, packs)
        size = min(recipe.training.per_device_train_batch_size, len(drawn))
        longest = _together(sorted(drawn, reverse=True)[:size])
        means = [sum(part) / len(drawn) for part in zip(*drawn, strict=True)]
        average = _together([_nth_of(means, i) for i in range(size)])
        held = sorted(_drawn(prepared.held_out, None), reverse=True)
        checked = held[: recipe.evaluation.per_device_eval_batch_size]
        return cls(average, longest, _together(checked) if checked else longest, len(drawn))

    def split(self, n: int) -> Batches:
        """The same with each batch split into n parts of equally many rows."""

        def part(rows: BatchShape) -> BatchShape:
            return rows.first(-(-len(rows.lengths) // n), None if rows.learned is None else -(-rows.learned // n))

        return replace(self, average=part(self.average), longest=part(self.longest))


@dataclass(frozen=True)
class Forecast:
    """What one recipe takes on one device, phase by phase."""

    setting: TracedModel
    batches: Batches
    profile: Profile
    level_limit: int | None = None  # the last level that may be chosen

    def curve(self, rows: BatchShape) -> StepAtLevels:
        """What a step over a batch of this shape takes."""
        return StepAtLevels(self.setting, rows)

    @cached_property
    def longest(self) -> StepAtLevels:
        """What a step over the longest batch takes."""
        return self.curve(self.batches.longest)

    @cached_property
    def average(self) -> StepAtLevels:
        """What a step over the average batch takes."""
        return self.longest if self.batches.average == self.batches.longest else self.curve(self.batches.average)

    def step_memory(self, budget_bytes: int, deepest: int) -> StepMemory:
        """The peaks by tokens and level, from which the training takes the level of each batch.

        Where even the longest batch takes less than half of the budget, deeper levels are not worth tracing: they count
        as the shallowest, which is no less. Nor are levels beyond `deepest`, that of the longest batch. Where the
        longest fits at no level, all batches of a training that is forced take the last one.
        """
        n, levels = self.setting.n_layers, self.setting.saver_levels
        rest = self.average.steady(0).rest
        base = rest["weights"] + rest["adapters"]
        savers = ("embedding",) if self.setting.host_embedding else ()
        if self.level_for(self.longest, budget_bytes) is None:
            peaks = (
                *[_NOT_TRACED] * (n + len(levels)),
                self.beside_a_step + self.longest.steady(deepest).peak.total_bytes,
            )
            return StepMemory((self.setting.laid_out(self.longest.rows),), (peaks,), base, levels, savers)
        ample = 2 * self.total(self.longest.steady(0).peak) < budget_bytes
        found: dict[int, tuple[int, ...]] = {}
        beside = self.beside_a_step
        for curve in (self.average, self.longest):
            peaks = (curve.steady(0).peak.total_bytes,) if ample else curve.peaks
            peaks += tuple(curve.steady(level).peak.total_bytes for level in range(n + 1, deepest + 1))
            peaks += peaks[-1:] * (n + 1 + len(levels) - len(peaks))
            found[self.setting.laid_out(curve.rows)] = tuple(beside + peak for peak in peaks)
        if not ample:
            small = self.curve(_SMALL).steady(0).peak.total_bytes  # of so few tokens the level does not matter
            found.setdefault(_SMALL.tokens, (beside + small,) * (n + 1 + len(levels)))
        tokens = tuple(sorted(found))
        return StepMemory(tokens, tuple(found[size] for size in tokens), base, levels, savers)

    def total(self, peak: Peak) -> int:
        """Bytes of `peak` with the device's context and its allocator's loss."""
        return sum(self.phase("", peak).parts.values())

    def phase(self, name: str, peak: Peak) -> PhasePlan:
        """The phase `name`: `peak` with what the device and its allocator add."""
        scale = _state_bytes(self.setting.recipe) / 8
        parts = {part: n for part, n in peak.parts.items() if n}
        if "optimizer" in parts:
            parts["optimizer"] = int(scale * parts["optimizer"])
        parts["allocator"] = self.profile.allocator_bytes(sum(parts.values()))
        parts["context"] = self.profile.context_in(name)
        return PhasePlan(name, sum(parts.values()), parts)

    def level_for(self, curve: StepAtLevels, budget_bytes: int) -> int | None:
        """The first level at which a step stays within the budget; None if it does at none."""
        if not self.leaves_room(curve, budget_bytes):
            return None
        room = budget_bytes - self.beside_a_step

        def stays(level: int) -> bool:
            return self.total(curve.steady(level).peak) <= room

        # The last level is the smallest: where it does not fit, the others need no trace.
        return next(filter(stays, self.levels), None) if stays(self.levels[0]) or stays(self.levels[-1]) else None

    def leaves_room(
        self, curve: StepAtLevels, budget_bytes: int, parts: Sequence[str] = ("weights", "adapters", "optimizer")
    ) -> bool:
        """Whether weights and optimizer state alone, or other `parts`, stay within the budget.

        They are the same at every level and for every split of a batch; where they do not, no other is worth tracing.
        """
        rest = curve.steady(self.levels[0]).rest
        always = {part: rest.get(part, 0) for part in parts}
        return self.total(Peak(sum(always.values()), always)) <= budget_bytes - self.beside_a_step

    @cached_property
    def levels(self) -> Sequence[int]:
        """The levels that the recipe allows, ascending."""
        n, training = self.setting.n_layers, self.setting.recipe.training
        last = n + len(self.setting.saver_levels)
        last = last if self.level_limit is None else min(last, self.level_limit)
        if training.lean == "always":
            return (last,)
        return {"never": range(1), "always": range(n, last + 1)}.get(training.gradient_checkpointing, range(last + 1))

    def evaluated_together(self, level: int, budget_bytes: int) -> int:
        """Rows that are evaluated at a time: as many as the recipe says, or fewer, so that they fit."""
        rest, size = self.average.steady(level).rest, len(self.batches.evaluation.lengths)
        while size > 1 and self.total(self._evaluation(rest, size).peak) > budget_bytes:
            size = -(-size // 2)
        return size

    def phases(self, average_level: int, longest_level: int, eval_rows: int) -> tuple[PhasePlan, ...]:
        """The phases of the run, in their order."""
        rest = self.average.steady(average_level).rest
        resting = Peak(sum(rest.values()), {**rest, "workspace": 0, "activations": 0})
        steady, longest = self.average.steady(average_level).peak, self.longest.steady(longest_level).peak
        written = [(resting, self._put_together + self._copied)]
        if self.beside_a_step:
            written += [(peak, self.beside_a_step) for peak in (steady, longest)]
        checkpoint = max((_with(peak, "workspace", n) for peak, n in written), key=self.total)
        return (
            self.phase("load", self._load(rest)),
            *self._reference(),
            self.phase("first step", self.average.first(average_level).peak),
            self.phase("steady step", steady),
            self.phase("longest batch", longest),
            self.phase("evaluation", self._evaluation(rest, eval_rows).peak),
            self.phase("checkpoint", checkpoint),
            self.phase("merge", self._merge()),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, a smaller last batch of an epoch included; 0 where the rows are not known."""
        training = self.setting.recipe.training
        n_rows = self.batches.n_rows
        if training.max_steps > 0 or n_rows is None:
            return max(0, training.max_steps)
        return math.ceil(training.num_train_epochs * self._steps_an_epoch)

    @property
    def _steps_an_epoch(self) -> int:
        """Optimizer steps of an epoch; 0 where the rows are not known."""
        training = self.setting.recipe.training
        micro_batches = math.ceil((self.batches.n_rows or 0) / training.per_device_train_batch_size)
        return math.ceil(micro_batches / training.gradient_accumulation_steps)

    @property
    def beside_a_step(self) -> int:
        """Bytes of the copy from which a checkpoint is written during training, if it is in the device's memory."""
        steps, recipe = self.steps, self.setting.recipe
        pace = saving_pace(recipe.training, steps, self._steps_an_epoch)
        follows_best = pace.strategy == "best" or recipe.evaluation.load_best_model_at_end
        is_unknown = not steps or (pace.strategy == "epoch" and not self._steps_an_epoch)
        return self._copied if follows_best or is_unknown or 0 < pace.first < steps else 0

    @property
    def _copied(self) -> int:
        """Bytes that the copy of a checkpoint on the host takes of the device's memory."""
        return self._saved if self.profile.backend == "cpu" or self.profile.shares_memory else 0

    @property
    def _put_together(self) -> int:
        """Bytes that a checkpoint takes on the device while its parts are gathered from several processes."""
        shards = self.setting.shards
        return self._saved if shards and (self.profile.backend == "cpu" or not shards.on_host) else 0

    @property
    def _saved(self) -> int:
        """Bytes of what is trained and of the optimizer's state, over all processes."""
        return int((4 + _state_bytes(self.setting.recipe)) * self.setting.parameters[0])

    def _evaluation(self, rest: dict[str, int], n_rows: int) -> StepCost:
        rows = self.batches.evaluation
        work = evaluation(self.setting, rows.first(n_rows, rows.learned))
        # The optimizer's state is still there after training.
        name, peak = next(iter(work.peaks.items()))
        return replace(work, peaks={name: _with(peak, "optimizer", rest["optimizer"])})

    def _reference(self) -> tuple[PhasePlan, ...]:
        """The reference's log-probabilities of all rows, where they are computed before the training."""
        section = self.setting.recipe.preferences
        if not (section.needs_reference and section.precompute_ref_log_probs):
            return ()
        rows = self.batches.longest
        n = max(1, SCORED_TOKENS // rows.lengths[0])
        share = None if rows.learned is None else -(-rows.learned * n // len(rows.lengths))
        batch = BatchShape(rows.lengths[:1] * n, share, rows.unfolded[:1] * n)
        return (self.phase("reference", evaluation(self.setting, batch).peak),)

    def _load(self, rest: dict[str, int]) -> Peak:
        """The base, and the largest weight in 16 bits with its scales while it is packed; of shards the largest unit.

        The first of several processes packs the base on the host.
        """
        shards = self.setting.shards
        if shards and self.profile.backend != "cpu":
            return _with(Peak(rest["weights"], {"weights": rest["weights"]}), "gathered", shards.sizes.largest)
        largest = self.setting.largest_weight
        n_blocks = largest // self.setting.recipe.quantization.bnb_4bit_blocksize
        working = 2 * largest + 16 * n_blocks if self.setting.recipe.method == "qlora" else 0
        whole = shards.sizes.all_bytes if shards else 0  # where the device is the host
        weights = whole or rest["weights"] + self.setting.table_bytes  # it goes to the host afterwards
        return _with(Peak(weights, {"weights": weights}), "workspace", working)

    def _merge(self) -> Peak:
        """One weight at a time: itself in 16 bits, what is added in float32, the sum in float32."""
        trained = 0 if self.setting.recipe.method == "full" else 10 * self.setting.largest_weight
        return _with(Peak(), "workspace", trained)


_Drawn = tuple[int, int, int, int]  # tokens, those that are learned, rows of a padded batch, tokens of the longest


def _drawn(examples: Examples, packs: Sequence[Sequence[int]] | None) -> list[_Drawn]:
    """What is known of each row, or of each pack of rows."""
    if not len(examples):
        return []
    columns = [examples.column(name).tolist() for name in ("length", "n_trained", "n_paths", "longest_path")]
    rows: list[_Drawn] = list(zip(*columns, strict=True))
    if packs is None:
        return rows
    return [_as_one([rows[row] for row in pack]) for pack in packs]


def _as_one(rows: Sequence[_Drawn]) -> _Drawn:
    tokens, learned, n_rows, longest = zip(*rows, strict=True)
    return sum(tokens), sum(learned), sum(n_rows), max(longest)


def _nth_of(means: Sequence[float], n: int) -> _Drawn:
    """The row numbered `n` of a batch in which the first rows together always have so many in the mean, rounded."""
    tokens, learned, n_rows = (round(mean * (n + 1)) - round(mean * n) for mean in means[:3])
    return tokens, learned, max(1, n_rows), round(means[3])


def _together(rows: Sequence[_Drawn]) -> BatchShape:
    unfolded = tuple((n, longest) for _tokens, _learned, n, longest in rows)
    lengths = tuple(tokens for tokens, *_ in rows)
    learned = sum(learned for _tokens, learned, *_ in rows)
    return BatchShape(lengths, learned, unfolded if any(n > 1 for n, _longest in unfolded) else ())


def _state_bytes(recipe: Recipe) -> float:
    return next((n for word, n in _STATES.items() if word in recipe.training.optim), 8.0)


def _with(peak: Peak, part: str, n_bytes: int) -> Peak:
    parts = {**peak.parts, part: peak.parts.get(part, 0) + n_bytes}
    return Peak(sum(parts.values()), parts)
