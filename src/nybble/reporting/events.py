"""Read events.jsonl and turn its lines into points of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nybble.reporting.plots import GREY, Line
from nybble.run.directory import read_whole_lines

_LARGEST = 1e18
_NUMBERS = ("step", "tokens", "seconds", "peak_bytes")
_MAY_BE_NONE = ("loss", "eval_loss")
Events = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]


def read_events(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The logged steps of a run, and the number of damaged lines that were skipped."""
    lines, n_skipped = read_whole_lines(run_dir / "events.jsonl")
    events = [line for line in lines if _is_event(line)]
    return events, n_skipped + len(lines) - len(events)


def _is_event(line: Mapping[str, Any]) -> bool:
    return all(_is_number(line.get(name)) for name in _NUMBERS) and all(
        line.get(name) is None or _is_number(line[name]) for name in _MAY_BE_NONE
    )


def _is_number(value: Any) -> bool:
    """Whether a curve can show this value."""
    return isinstance(value, int | float) and abs(value) < _LARGEST  # NaN is not


def held_out_points(record: Mapping[str, Any], events: Events) -> list[tuple[float, float]]:
    """Pairs of step and held-out loss: before, during and after training."""
    base = record.get("evaluation_base")
    tuned = record.get("evaluation_tuned")
    points = [(e["step"], e["eval_loss"]) for e in events if e.get("eval_loss") is not None]
    step = record.get("weights_step") or max((e["step"] for e in events), default=None)
    if base:
        points.insert(0, (0, base["loss"]))
    if tuned and step:
        points = [*(point for point in points if point[0] != step), (step, tuned["loss"])]  # it was measured on all
    return sorted(points)


def memory_points(events: Events) -> Points:
    """The steps, and the peak memory in MB since the previous logged step."""
    trained = [event for event in events if event.get("loss") is not None]
    return [e["step"] for e in trained], [e["peak_bytes"] / 1e6 for e in trained]


def speed_points(events: Events) -> Points:
    """The steps, and the tokens per second since the previous logged step."""
    trained = [event for event in events if event.get("loss") is not None]
    if len(trained) == 1:  # of a run of one step
        trained.insert(0, {"step": 0, "tokens": 0, "seconds": 0.0})
    pairs = [(a, b) for a, b in pairwise(trained) if b["seconds"] > a["seconds"]]
    return [b["step"] for _, b in pairs], [
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs
    ]


def predicted_line(label: str, record: Mapping[str, Any], events: Events) -> list[Line]:
    """The predicted peak memory of training as a horizontal line; an empty list if there is no prediction."""
    steps = memory_points(events)[0]
    predicted = (record.get("phases", {}).get("train") or {}).get("predicted_bytes")
    predicted = predicted or (record.get("plan") or {}).get("predicted_bytes", {}).get("train")
    if not predicted or not steps:
        return []
    return [Line(label, [steps[0], steps[-1]], [predicted / 1e6] * 2, GREY, ":")]


def figure_points(events: Events, name: str) -> Points:
    """The steps, and what the objective reported under `name`; empty if it reports no such figure."""
    known = [(e["step"], figures[name]) for e in events if name in (figures := _figures_of(e))]
    return [step for step, _ in known], [value for _, value in known]


def _figures_of(event: Mapping[str, Any]) -> Mapping[str, float]:
    figures = event.get("figures")
    found = figures if isinstance(figures, Mapping) else {}
    return {name: value for name, value in found.items() if _is_number(value)}


def loss_points(events: Events) -> Points:
    """The steps, and the training loss."""
    trained = [event for event in events if event.get("loss") is not None]
    return [event["step"] for event in trained], [event["loss"] for event in trained]
