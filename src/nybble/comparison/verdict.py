"""The verdict: a paragraph computed from the figures, which says where a difference may be chance."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.comparison.figures import Arm, Comparison, Difference
from nybble.intervals import Interval
from nybble.units import format_bytes, format_count, format_number, format_share


def verdict(found: Comparison) -> str:
    """A text for people: which arm is best, by how much, whether that is more than noise, and what each arm costs."""
    measured = [arm for arm in found.arms if arm.measured]
    judged = sorted((arm for arm in measured if arm.eval_loss is not None), key=lambda arm: arm.eval_loss or 0.0)
    words: list[str] = []
    if not measured:
        words.append("No arm has been measured yet.")
    elif not judged:
        words.append(
            "No rows were held out, so nothing says which arm learned more; hold some out with --eval_fraction."
        )
    elif len(judged) == 1:
        words.append(f"Only {judged[0].name} has been measured: held-out loss {format_number(judged[0].eval_loss)}.")
    elif not found.same_rows:
        words.append("The arms were evaluated on different rows or seeds, so their losses cannot be compared.")
    else:
        words += _on_loss(found, judged)
        words += _on_answers(found, judged)
        words += _on_preferences(judged)
        words += _on_seeds(judged)
    words += _on_cost(measured)
    words += [_on_missing(arm) for arm in found.arms if arm.status in ("failed", "does not fit")]
    return " ".join(words)


def _on_loss(found: Comparison, judged: Sequence[Arm]) -> list[str]:
    best, *others = judged
    rows = f"On {format_count(found.n_held_out)} held-out rows"
    words = [f"{rows}, {best.name} has the lowest loss, {format_number(best.eval_loss)} nats per token."]
    even = [best]
    for arm in others:
        apart = _apart(found.differences, arm.name, best.name)
        if apart is None:
            words.append(f"{arm.name} has {format_number(arm.eval_loss)}, a difference of unknown certainty.")
        elif apart.within_noise:
            even.append(arm)
            words.append(f"{arm.name} ({format_number(arm.eval_loss)}) is within noise of it: {_span(apart)}.")
        else:
            words.append(f"{arm.name} ({format_number(arm.eval_loss)}) is worse by more than noise: {_span(apart)}.")
    lightest = min(even, key=lambda arm: arm.peak_bytes or 0)
    if len(even) > 1:
        words.append(f"Of the arms that do not differ by more than noise, {lightest.name} takes the least memory.")
    return words


def _on_answers(found: Comparison, judged: Sequence[Arm]) -> list[str]:
    answered = sorted((arm for arm in judged if arm.exact_match is not None), key=lambda arm: -(arm.exact_match or 0.0))
    if len(answered) < 2:
        return []
    best, *others = answered
    words = []
    for arm in others:
        apart = _apart(found.differences, arm.name, best.name, answers=True)
        noise = "" if apart is None else ", within noise" if apart.within_noise else ", worse by more than noise"
        words.append(f"{arm.name} {format_share(arm.exact_match)}{noise}")
    return [f"Answered exactly: {best.name} {format_share(best.exact_match)}; {'; '.join(words)}."]


def _on_preferences(judged: Sequence[Arm]) -> list[str]:
    """What held-out pairs say. Rewards differ between objectives, and the loss is that of chosen answers alone."""
    known = [arm for arm in judged if arm.preference_accuracy is not None]
    if not known:
        return []
    shares = (f"{arm.name} {format_share(arm.preference_accuracy)}{_within(arm)}" for arm in known)
    words = ["These losses are those of chosen answers."] if len({arm.objective for arm in judged}) > 1 else []
    return [*words, f"Held-out answers in the right order, by each objective's own rewards: {', '.join(shares)}."]


def _within(arm: Arm) -> str:
    span = arm.preference_accuracy_interval
    return "" if span is None else f" ({format_share(span.low)} to {format_share(span.high)})"


def _on_seeds(judged: Sequence[Arm]) -> list[str]:
    n = min(len(arm.seeds) for arm in judged)
    if n > 1:
        return [f"The noise is that of the rows and of {n} seeds."]
    return ["With one seed the noise is that of the rows alone; --seeds 3 also measures that of the training."]


def _on_cost(measured: Sequence[Arm]) -> list[str]:
    if len(measured) < 2:
        return []
    by_memory = sorted(measured, key=lambda arm: arm.peak_bytes or 0)
    least, most = by_memory[0], by_memory[-1]
    peaks = (format_bytes(least.peak_bytes), format_bytes(most.peak_bytes))
    words = [f"{least.name} peaks at {peaks[0]} of memory, {most.name} at {peaks[1]}."]
    by_speed = sorted((arm for arm in measured if arm.tokens_per_second), key=lambda arm: -(arm.tokens_per_second or 0))
    if len(by_speed) > 1:
        fast, slow = by_speed[0], by_speed[-1]
        words.append(
            f"{fast.name} trains {format_count(fast.tokens_per_second)} tokens/s, "
            f"{slow.name} {format_count(slow.tokens_per_second)}."
        )
    return words


def _on_missing(arm: Arm) -> str:
    what = "does not fit here and was not run" if arm.status == "does not fit" else "failed"
    predicted = f"; predicted peak {format_bytes(arm.predicted_bytes)}" if arm.predicted_bytes else ""
    return f"{arm.name} {what}{predicted}" + (f" ({arm.error})." if arm.error else ".")


def _apart(differences: Sequence[Difference], a: str, b: str, answers: bool = False) -> Interval | None:
    """The difference arm `a` minus arm `b`, if both were measured on the same rows."""
    for difference in differences:
        found = difference.exact_match if answers else difference.loss
        if found is not None and (difference.a, difference.b) == (a, b):
            return found
        if found is not None and (difference.a, difference.b) == (b, a):
            return Interval(-found.value, -found.high, -found.low)
    return None


def _span(apart: Interval) -> str:
    return f"{apart.value:+.4f}, 95 % interval {apart.low:+.4f} to {apart.high:+.4f}"
