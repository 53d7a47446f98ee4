"""The search for the fastest neutral settings within a budget, and for changes that help where none fits.

Neutral are: the layers that are recomputed, the memory savers beyond that, the split of a batch into micro-batches (the
loss is divided by the learned tokens of the whole step), and the rows that are evaluated at a time. None of them
changes what is learned. Changes that do are only proposed, those that cost learning least first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nybble.planning.phases import Batches, Forecast
from nybble.planning.shapes import config_of
from nybble.planning.traced_step import BatchShape
from nybble.recipe import Change, LevelPlan, PhasePlan, Recipe
from nybble.recipe.shapes import SHAPES

_SPLITS = 3  # splits of a batch that are tried


@dataclass(frozen=True)
class ChosenSettings:
    """The neutral settings that were chosen, and what follows from them."""

    forecast: Forecast
    n_parts: int  # micro-batches that each batch is split into
    average_level: int
    longest_level: int
    eval_rows: int
    phases: tuple[PhasePlan, ...]
    fits: bool

    @property
    def depths(self) -> tuple[int, int]:
        """The layers that are recomputed in the average and in the longest batch."""
        n = self.forecast.setting.n_layers
        return min(self.average_level, n), min(self.longest_level, n)

    @property
    def savers(self) -> tuple[str, ...]:
        """The memory savers that the longest batch needs."""
        setting = self.forecast.setting
        beyond = self.longest_level - setting.n_layers
        taken = setting.saver_levels[beyond - 1] if beyond > 0 else ()
        return tuple(r for r in setting.savers if r in taken or (r == "embedding" and setting.host_embedding))

    @property
    def host_bytes(self) -> int:
        """Bytes that wait on the host, at their highest."""
        longest = self.forecast.longest.steady(self.longest_level)
        return max(longest.host_bytes, self.forecast.average.steady(self.average_level).host_bytes)

    @property
    def flops(self) -> int:
        """Floating-point operations of one batch, over all of its parts."""
        return self.n_parts * self.forecast.average.steady(self.average_level).flops

    @property
    def seconds(self) -> float:
        """Predicted time of one batch, over all of its parts."""
        work = self.forecast.average.steady(self.average_level)
        return self.n_parts * self.forecast.profile.seconds(work)


def choose(forecast: Forecast, budget_bytes: int, n_parts: int | None = None) -> ChosenSettings:
    """The fastest split and levels within the budget, or the smallest where nothing fits. `n_parts` fixes the split.

    The embedding table goes to the host, where it stays, only if no batch fits without one of the savers after it.
    """
    setting = forecast.setting
    if "embedding" not in setting.savers:
        return _fastest(forecast, budget_bytes, n_parts)
    beside = replace(forecast, setting=replace(setting, host_embedding=True))
    if setting.recipe.training.lean == "always":
        return _fastest(beside, budget_bytes, n_parts)
    shallow = _fastest(replace(forecast, level_limit=setting.n_layers + 1), budget_bytes, n_parts)
    return shallow if shallow.fits else _fastest(beside, budget_bytes, n_parts)


def _fastest(forecast: Forecast, budget_bytes: int, n_parts: int | None) -> ChosenSettings:
    size = forecast.setting.recipe.training.per_device_train_batch_size
    parts = [n_parts] if n_parts else [n for n in range(1, size + 1) if size % n == 0][: _SPLITS + 1]
    if not forecast.leaves_room(forecast.average, budget_bytes):
        parts = parts[-1:]
    found: list[ChosenSettings] = []
    for n in parts:
        found.append(_at(forecast, n, budget_bytes))
        # Without recomputation more parts only cost time; once they cost more than they save, still more do too.
        slower = len(found) > 1 and found[-2].fits and found[-1].seconds > found[-2].seconds
        if found[-1].fits and (found[-1].average_level == 0 or slower):
            break
    fitting = [choice for choice in found if choice.fits]
    # A split must be worth more than the error of the prediction.
    return min(fitting, key=lambda c: c.seconds * (1 if c.n_parts == 1 else 1.05)) if fitting else found[-1]


def _at(forecast: Forecast, n_parts: int, budget_bytes: int) -> ChosenSettings:
    part = replace(forecast, batches=forecast.batches.split(n_parts)) if n_parts > 1 else forecast
    average, longest = (part.level_for(curve, budget_bytes) for curve in (part.average, part.longest))
    last = part.levels[-1]
    levels = (last if average is None else average, last if longest is None else longest)
    eval_rows = part.evaluated_together(levels[0], budget_bytes)
    phases = part.phases(*levels, eval_rows)
    fits = all(phase.peak_bytes <= budget_bytes for phase in phases)
    return ChosenSettings(part, n_parts, *levels, eval_rows, phases, fits)


def plan_levels(choice: ChosenSettings) -> tuple[LevelPlan, ...]:
    """The longest batch at every memory saver level, each with the savers of those before it."""
    forecast = choice.forecast
    setting = replace(forecast.setting, host_embedding=False)
    curve, n = replace(forecast, setting=setting).longest, setting.n_layers
    named = [("nothing recomputed", 0, False), ("every layer recomputed", n, False)]
    for saver in setting.savers:
        named.append((saver, named[-1][1] + (saver != "embedding"), named[-1][2] or saver == "embedding"))
    moved = replace(forecast, setting=replace(setting, host_embedding=True)).longest
    made = []
    for name, level, with_table in named:
        work = (moved if with_table else curve).steady(level)
        taken = (
            name in choice.savers
            if name in setting.savers
            else (choice.longest_level >= n if level else not choice.longest_level)
        )
        made.append(LevelPlan(name, forecast.total(work.peak), work.peak.total_bytes, work.host_bytes, taken))
    return tuple(made)


def smallest_peak(forecast: Forecast) -> int:
    """The highest peak of the run at the last level whose weights are not decoded in slices (slow to trace)."""
    level = max(level for level in forecast.levels if level == forecast.levels[0] or not _slices(forecast, level))
    return _peak_at(forecast, level)


def _peak_at(forecast: Forecast, level: int) -> int:
    """The highest peak of the run if every batch is the longest one, at that level and with one row evaluated."""
    setting = forecast.setting
    if "embedding" in setting.savers:
        forecast = replace(forecast, setting=replace(setting, host_embedding=True))
    slim = replace(forecast, batches=replace(forecast.batches, average=forecast.batches.longest))
    return max(phase.peak_bytes for phase in slim.phases(level, level, 1))


def _slices(forecast: Forecast, level: int) -> bool:
    n, levels = forecast.setting.n_layers, forecast.setting.saver_levels
    return level > n and "slices" in levels[level - n - 1]


def cheapest_changes(chosen: ChosenSettings, budget_bytes: int) -> tuple[Change, ...]:
    """Changes that would make the run smaller than what was chosen, those that cost learning least first.

    Changes that cannot help are not tried: those of the batch where weights and optimizer state alone exceed the
    budget, and those of what is trained where the weights alone do.
    """
    forecast = chosen.forecast
    has_room = forecast.leaves_room(forecast.average, budget_bytes)
    cannot_help = set() if has_room else set(_OF_THE_BATCH)
    if not forecast.leaves_room(forecast.average, budget_bytes, parts=("weights",)):
        cannot_help |= {*_OF_WHAT_IS_TRAINED}
    now = max(phase.peak_bytes for phase in chosen.phases)
    found = []
    for setting, value, recipe, batches, meaning in _variants(forecast, chosen.n_parts):
        if setting in cannot_help:
            continue
        other = replace(forecast, setting=forecast.setting.of(recipe=recipe), batches=batches)
        peak = _peak_at(other, other.levels[-1])
        if peak < 0.995 * now:
            found.append(Change(setting, value, peak, peak <= budget_bytes, meaning))
    length = largest_length(forecast, budget_bytes) if has_room else None
    if length is not None and length < max(forecast.batches.longest.lengths):
        peak = smallest_peak(replace(forecast, batches=_cut(forecast.batches, length)))
        found.append(Change("max_length", str(length), peak, True, "longer rows are cut"))
    return tuple(found)


_OF_THE_BATCH = ("gradient_checkpointing", "per_device_train_batch_size")  # weights and states stay as they are
_OF_WHAT_IS_TRAINED = ("r", "optim")  # the weights of the base stay as they are


def _variants(forecast: Forecast, n_parts: int) -> Iterator[tuple[str, str, Recipe, Batches, str]]:
    """Changes of a run whose batches are in `n_parts` already: setting, value, recipe, batches and what it means."""
    recipe, batches = forecast.setting.recipe, forecast.batches
    training = recipe.training
    if training.gradient_checkpointing == "never":
        yield (
            "gradient_checkpointing",
            "auto",
            changed(recipe, "training", gradient_checkpointing="auto"),
            batches,
            "slower",
        )
    if training.lean == "never":
        lean = changed(recipe, "training", lean="auto")
        yield "lean", "auto", lean, batches, "what can wait lies on the host, the MLP runs in tiles: the same result"
    size = training.per_device_train_batch_size
    if size > n_parts:
        sizes = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": size * training.gradient_accumulation_steps,
        }
        yield (
            "per_device_train_batch_size",
            "1",
            changed(recipe, "training", **sizes),
            batches.split(size // n_parts),
            (f"with gradient_accumulation_steps {sizes['gradient_accumulation_steps']} the same result, slower"),
        )
    if recipe.method == "full":
        yield "method", "lora", recipe.model_copy(update={"method": "lora"}), batches, "adapters on a 16-bit base"
    if recipe.method != "qlora":
        yield "method", "qlora", recipe.model_copy(update={"method": "qlora"}), batches, "adapters on a 4-bit base"
    if recipe.method != "full" and recipe.lora.r > 8:
        yield "r", "8", changed(recipe, "lora", r=8), batches, "smaller adapters"
    if "8bit" not in training.optim and not forecast.setting.shards:
        yield (
            "optim",
            "adamw_8bit",
            changed(recipe, "training", optim="adamw_8bit"),
            batches,
            "optimizer state in 8 bits",
        )


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """`recipe` with these values in one of its sections."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def largest_length(forecast: Forecast, budget_bytes: int) -> int | None:
    """The largest `max_length` (a multiple of 16) that fits, all rows being that long; None where none does.

    A peak is nearly a line over the length, so a length is tried where the line through the two lengths around it meets
    the budget, and just beyond one that fits; every third is the middle between those, in case it is no line.
    """

    def peak(length: int) -> int:
        return smallest_peak(replace(forecast, batches=_stretched(forecast.batches, 16 * length)))

    positions = forecast.setting.config.get_text_config().max_position_embeddings
    low, high = 1, max(2, positions // 16 + 1)  # in units of 16 tokens
    peaks = {low: peak(low)}
    if peaks[low] > budget_bytes:
        return None
    turn = 0
    while high - low > (step := max(1, low // 32)):
        middle = int(min((low * high) ** 0.5, (low + high) / 2)) if high > 4 * low else (low + high) // 2
        others = sorted((n for n in peaks if n != low), key=lambda n: abs(n - low))
        if others and turn % 3 != 2:
            slope = (peaks[others[0]] - peaks[low]) / (others[0] - low)
            meets = low + int((budget_bytes - peaks[low]) / slope) if slope > 0 else high
            middle = min(max(meets, low + step), high - 1)
        peaks[middle] = peak(middle)
        low, high = (middle, high) if peaks[middle] <= budget_bytes else (low, middle)
        turn += 1
    return 16 * low


def _stretched(batches: Batches, length: int) -> Batches:
    def all_of(rows: BatchShape) -> BatchShape:
        return BatchShape((length,) * len(rows.lengths))

    return Batches(all_of(batches.average), all_of(batches.longest), all_of(batches.evaluation))


def _cut(batches: Batches, length: int) -> Batches:
    def cut(rows: BatchShape) -> BatchShape:
        lengths = tuple(min(length, n) for n in rows.lengths)
        unfolded = tuple((n, min(length, longest)) for n, longest in rows.unfolded)
        return BatchShape(lengths, None if rows.learned is None else min(rows.learned, sum(lengths)), unfolded)

    return Batches(cut(batches.average), cut(batches.longest), cut(batches.evaluation))


def largest_model(forecast: Forecast, budget_bytes: int) -> tuple[str, int] | None:
    """The known shape with most weights that fits these batches, and its peak; None where none does."""

    def weights(key: str) -> int:
        s = SHAPES[key]
        attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
        return s.layers * (attention + 3 * s.hidden * s.intermediate) + s.vocabulary * s.hidden * (1 if s.tied else 2)

    def peak_of(key: str) -> int:
        return smallest_peak(replace(forecast, setting=forecast.setting.of(config=config_of(key))))

    ordered = sorted(SHAPES, key=weights)
    low, high = -1, len(ordered)
    peaks: dict[int, int] = {}
    while high - low > 1:
        middle = (low + high) // 2
        peaks[middle] = peak_of(ordered[middle])
        low, high = (middle, high) if peaks[middle] <= budget_bytes else (low, middle)
    return (ordered[low], peaks[low]) if low >= 0 else None
