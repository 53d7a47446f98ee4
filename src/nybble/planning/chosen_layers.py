"""Which layers of a model are traced in place of all, and what all of them take by what those took.

A group is the layers of one kind that are recomputed, or of one that are not. Of each group the first and the last
layer are traced: what lies in memory grows, or falls, from one to the other, so a peak is at either. A second trace for
each group that has more layers holds one more of them, and the difference at each place, counted before that layer and
behind it, is what each layer of the group adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nybble.planning.memory_tracer import Peak
from nybble.planning.traced_step import StepCost

_Group = tuple[int, bool]  # kind, and whether it is recomputed


@dataclass(frozen=True)
class OneMore:
    """The chosen layers with one more of a group."""

    layers: tuple[int, ...]
    n_recomputed: int
    at: int  # the place of the one
    group: _Group
    n_left: int  # layers of the group that are not chosen


@dataclass(frozen=True)
class Chosen:
    """The layers that are traced, in their order; each stands for a layer of the model."""

    layers: tuple[int, ...]  # numbers of layers in the model, ascending, of the kinds that are wanted in that order
    n_recomputed: int
    stand_for: tuple[int, ...]
    groups: tuple[_Group, ...]  # of all layers of the model
    more: tuple[OneMore, ...] = ()


def chosen(kinds: tuple[int, ...], depth: int, of_each: int = 2) -> Chosen:
    """The layers to trace for a model whose layers have these `kinds` and whose first `depth` are recomputed.

    `of_each` 3 adds one between first and last. All layers are traced where there are hardly more than chosen ones, or
    where no layers of the kinds that are wanted follow each other in the order that is wanted.
    """
    groups = tuple((kind, number < depth) for number, kind in enumerate(kinds))
    whole = Chosen(tuple(range(len(kinds))), depth, tuple(range(len(kinds))), groups)
    # The order of the whole model, whatever the depth, so that most depths are traced by the same layers.
    marks = [((kinds.index(kind), 0), kind, 0) for kind in {*kinds}]
    marks += [((kinds.index(kind), 1), kind, 1) for kind in {*kinds} if of_each > 2]
    marks += [((len(kinds) - 1 - kinds[::-1].index(kind), 2), kind, -1) for kind in {*kinds}]
    few: list[int] = []
    for is_recomputed in (True, False):
        for _order, kind, nth in sorted(marks):
            same = [number for number, group in enumerate(groups) if group == (kind, is_recomputed)]
            if len(same) > abs(nth) + (nth == 1):  # else it is among the others
                few.append(same[nth])
    layers = _following(kinds, [kinds[n] for n in few])
    if layers is None or len(few) + 1 >= len(kinds):
        return whole
    n_recomputed = sum(n < depth for n in few)
    more = []
    for group in dict.fromkeys(groups):
        places = [place for place, n in enumerate(few) if groups[n] == group]
        n_left = groups.count(group) - len(places)
        if n_left:
            one = _one_more(kinds, few, places, OneMore((), n_recomputed + group[1], 0, group, n_left))
            if one is None:
                return whole
            more.append(one)
    return Chosen(layers, n_recomputed, tuple(few), groups, tuple(more))


def _one_more(kinds: Sequence[int], few: Sequence[int], places: Sequence[int], wanted: OneMore) -> OneMore | None:
    """`wanted` with its layers: those of `few` and one between the first and the last of `places`."""
    for at in range(places[-1], places[0], -1):
        layers = _following(kinds, [*(kinds[n] for n in few[:at]), wanted.group[0], *(kinds[n] for n in few[at:])])
        if layers is not None:
            return replace(wanted, layers=layers, at=at)
    return None


def _following(kinds: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Ascending numbers of layers that have the `wanted` kinds in their order; None if there are none."""
    found: list[int] = []
    rest = iter(enumerate(kinds))
    for kind in wanted:
        number = next((n for n, here in rest if here == kind), None)
        if number is None:
            return None
        found.append(number)
    return tuple(found)


def extrapolated(few: Chosen, base: StepCost, works: Sequence[StepCost]) -> StepCost:
    """What all layers take: `base` is what the chosen ones took, `works` what they took with one more of each group."""
    pairs = list(zip(few.more, works, strict=True))
    peaks = {name: peak for name in base.peaks if (peak := _peak(few, name, base, pairs)) is not None}
    numbers = {}
    for name in ("flops", "moved_bytes", "operators", "host_bytes"):
        own = getattr(base, name)
        numbers[name] = own + sum(one.n_left * (getattr(work, name) - own) for one, work in pairs)
    rest = dict(base.rest)
    for one, work in pairs:
        rest = _plus(rest, _minus(work.rest, base.rest), one.n_left)
    return StepCost(peaks=peaks, rest=rest, **numbers)


def _peak(few: Chosen, name: str, base: StepCost, pairs: list[tuple[OneMore, StepCost]]) -> Peak | None:
    """The peak of a section; None where a trace lacks it."""
    section, _, number = name.partition(" ")
    parts = dict(base.peaks[name].parts)
    for one, work in pairs:
        if not number.isdigit():
            if name not in work.peaks:
                return None
            parts = _plus(parts, _minus(work.peaks[name].parts, base.peaks[name].parts), one.n_left)
            continue
        place = int(number)
        for is_before in (True, False):
            n = _n_left(few, one.group, place, is_before=is_before)
            # The slope at this place, or at the nearest one on the other side of the layer that was added.
            side = place if (place >= one.at) == is_before else one.at - (not is_before)
            here, there = f"{section} {side}", f"{section} {side + (side >= one.at)}"
            if n and (here not in base.peaks or there not in work.peaks):
                return None
            if n:
                parts = _plus(parts, _minus(work.peaks[there].parts, base.peaks[here].parts), n)
    return Peak(sum(parts.values()), parts)


def _n_left(few: Chosen, group: _Group, place: int, *, is_before: bool) -> int:
    """How many layers of `group` lie before the layer at `place`, or behind it, in the model beyond those chosen."""
    number = few.stand_for[place]
    traced = [few.groups[n] for n in few.stand_for]
    if is_before:
        return few.groups[:number].count(group) - traced[:place].count(group)
    return few.groups[number + 1 :].count(group) - traced[place + 1 :].count(group)


def _minus(parts: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    return {part: parts.get(part, 0) - others.get(part, 0) for part in {**parts, **others}}


def _plus(parts: dict[str, int], slope: dict[str, int], n: int) -> dict[str, int]:
    return {part: parts.get(part, 0) + n * slope.get(part, 0) for part in {**parts, **slope}}
