"""The choice of neutral settings within a budget, and what to change where none fits.

Neutral: recomputed layers and the split of a batch into micro-batches; the loss is divided by the learned tokens of
the whole step, so neither changes what is learned. Changes that do are only named, the cheapest for learning first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nybble.planning.forecast import Batches, Forecast
from nybble.planning.shapes import SHAPES, config_of
from nybble.planning.step import Rows
from nybble.recipe import Change, PhasePlan, Recipe

_SPLITS = 3  # splits of a batch that are looked at


@dataclass(frozen=True)
class Choice:
    """Neutral settings and what follows from them."""

    forecast: Forecast
    n_parts: int  # of each batch
    average_depth: int
    longest_depth: int
    phases: tuple[PhasePlan, ...]
    fits: bool

    @property
    def flops(self) -> int:
        """Of one batch, all parts."""
        return self.n_parts * self.forecast.average.steady(self.average_depth).flops

    @property
    def seconds(self) -> float:
        """Of one batch, all parts."""
        work = self.forecast.average.steady(self.average_depth)
        return self.n_parts * self.forecast.profile.seconds(work.flops, work.moved_bytes)


def choose(forecast: Forecast, budget_bytes: int, n_parts: int | None = None) -> Choice:
    """The fastest split and depth within the budget; the smallest where nothing fits. `n_parts` fixes the split."""
    size = forecast.setting.recipe.training.per_device_train_batch_size
    parts = [n_parts] if n_parts else [n for n in range(1, size + 1) if size % n == 0][: _SPLITS + 1]
    found: list[Choice] = []
    for n in parts:
        found.append(_at(forecast, n, budget_bytes))
        # Without recomputation more parts only cost, and once they cost more than they save they go on doing so.
        slower = len(found) > 1 and found[-2].fits and found[-1].seconds > found[-2].seconds
        if found[-1].fits and (found[-1].average_depth == 0 or slower):
            break
    fitting = [choice for choice in found if choice.fits]
    # A split must be worth more than the error of the prediction.
    return min(fitting, key=lambda c: c.seconds * (1 if c.n_parts == 1 else 1.05)) if fitting else found[-1]


def _at(forecast: Forecast, n_parts: int, budget_bytes: int) -> Choice:
    part = replace(forecast, batches=forecast.batches.split(n_parts)) if n_parts > 1 else forecast
    average, longest = (part.depth_for(curve, budget_bytes) for curve in (part.average, part.longest))
    deepest = part.deepest()
    depths = (deepest if average is None else average, deepest if longest is None else longest)
    phases = part.phases(*depths)
    fits = all(phase.peak_bytes <= budget_bytes for phase in phases)
    return Choice(part, n_parts, *depths, phases, fits)


def smallest_peak(forecast: Forecast) -> int:
    """The highest moment of the run with all layers recomputed, where the recipe lets them be."""
    depth = forecast.deepest()
    slim = replace(forecast, batches=replace(forecast.batches, average=forecast.batches.longest))
    return max(phase.peak_bytes for phase in slim.phases(depth, depth))


def cheapest_changes(forecast: Forecast, budget_bytes: int) -> tuple[Change, ...]:
    """What would make the run smaller, in the order of what it costs learning."""
    now = smallest_peak(forecast)
    found = []
    for setting, value, recipe, batches, meaning in _variants(forecast):
        other = replace(forecast, setting=replace(forecast.setting, recipe=recipe), batches=batches)
        peak = smallest_peak(other)
        if peak < 0.995 * now:
            found.append(Change(setting, value, peak, peak <= budget_bytes, meaning))
    length = largest_length(forecast, budget_bytes)
    if length is not None and length < max(forecast.batches.longest.lengths):
        peak = smallest_peak(replace(forecast, batches=_cut(forecast.batches, length)))
        found.append(Change("max_length", str(length), peak, True, "longer rows are cut"))
    return tuple(found)


def _variants(forecast: Forecast) -> Iterator[tuple[str, str, Recipe, Batches, str]]:
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
    if recipe.evaluation.per_device_eval_batch_size > 1:
        one = replace(batches, evaluation=Rows(batches.evaluation.lengths[:1]))
        other = changed(recipe, "evaluation", per_device_eval_batch_size=1)
        yield "per_device_eval_batch_size", "1", other, one, "slower evaluation, the same figures"
    size = training.per_device_train_batch_size
    if size > 1:
        sizes = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": size * training.gradient_accumulation_steps,
        }
        yield (
            "per_device_train_batch_size",
            "1",
            changed(recipe, "training", **sizes),
            batches.split(size),
            (f"with gradient_accumulation_steps {sizes['gradient_accumulation_steps']} the same result, slower"),
        )
    if recipe.method == "full":
        yield "method", "lora", recipe.model_copy(update={"method": "lora"}), batches, "adapters on a 16-bit base"
    if recipe.method != "qlora":
        yield "method", "qlora", recipe.model_copy(update={"method": "qlora"}), batches, "adapters on a 4-bit base"
    if recipe.method != "full" and recipe.lora.r > 8:
        yield "r", "8", changed(recipe, "lora", r=8), batches, "smaller adapters"
    if "8bit" not in training.optim:
        yield (
            "optim",
            "adamw_8bit",
            changed(recipe, "training", optim="adamw_8bit"),
            batches,
            "optimizer state in 8 bits",
        )


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """`recipe` with other values in a section."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def largest_length(forecast: Forecast, budget_bytes: int) -> int | None:
    """The largest `max_length` (a multiple of 16) that fits, all rows being that long; None where none does."""

    def fits(length: int) -> bool:
        return smallest_peak(replace(forecast, batches=_stretched(forecast.batches, length))) <= budget_bytes

    positions = forecast.setting.config.get_text_config().max_position_embeddings
    low, high = 1, max(2, positions // 16 + 1)  # in units of 16 tokens
    if not fits(16 * low):
        return None
    while high - low > max(1, low // 32):
        middle = min((low * high) ** 0.5, (low + high) / 2) if high > 4 * low else (low + high) / 2
        low, high = (int(middle), high) if fits(16 * int(middle)) else (low, int(middle))
    return 16 * low


def _stretched(batches: Batches, length: int) -> Batches:
    def all_of(rows: Rows) -> Rows:
        return Rows((length,) * len(rows.lengths))

    return Batches(all_of(batches.average), all_of(batches.longest), all_of(batches.evaluation))


def _cut(batches: Batches, length: int) -> Batches:
    def cut(rows: Rows) -> Rows:
        lengths = tuple(min(length, n) for n in rows.lengths)
        return Rows(lengths, None if rows.learned is None else min(rows.learned, sum(lengths)))

    return Batches(cut(batches.average), cut(batches.longest), cut(batches.evaluation))


def largest_model(forecast: Forecast, budget_bytes: int) -> tuple[str, int] | None:
    """The known shape with most weights that fits these batches, and its peak; None where none does."""

    def weights(key: str) -> int:
        s = SHAPES[key]
        attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
        return s.layers * (attention + 3 * s.hidden * s.intermediate) + s.vocabulary * s.hidden * (1 if s.tied else 2)

    def peak_of(key: str) -> int:
        return smallest_peak(replace(forecast, setting=replace(forecast.setting, config=config_of(key)), traced=True))

    ordered = sorted(SHAPES, key=weights)
    low, high = -1, len(ordered)
    peaks: dict[int, int] = {}
    while high - low > 1:
        middle = (low + high) // 2
        peaks[middle] = peak_of(ordered[middle])
        low, high = (middle, high) if peaks[middle] <= budget_bytes else (low, middle)
    return (ordered[low], peaks[low]) if low >= 0 else None
