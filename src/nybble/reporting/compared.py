"""Write a comparison's report from its files: HTML (one file, no network), Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import InputError
from nybble.guard import as_path, read_object, shown
from nybble.reporting.events import loss_points, memory_points, predicted_line, read_events, speed_points
from nybble.reporting.ledger import ledger_lines
from nybble.reporting.pages import fill, of_record
from nybble.reporting.plots import COLORS, DASHES, Line, draw, draw_intervals
from nybble.reporting.render import environment, recipe_lines, skipped_note, write_report
from nybble.run.directory import read_lines, read_record, to_json
from nybble.storage.atomic import write_text
from nybble.units import format_bytes, format_count, format_number, format_seconds, format_share

_PER_RUN = ("training.output_dir", "training.seed")  # settings that always differ between runs


@dataclass(frozen=True)
class _Run:
    """One run of an arm, running or finished."""

    arm: int
    label: str
    folder: Path
    record: dict[str, Any]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    n_skipped: int


def write_comparison_report(folder: Path) -> Path:
    """Write report.html, report.md and report.json into a comparison's folder, which may still be running.

    Raises:
        InputError: the folder is not a comparison, or comparison.json is damaged.
    """
    comparison = _read(folder)
    with of_record(folder / "comparison.json"):
        return _write(folder, comparison)


def _write(folder: Path, comparison: Mapping[str, Any]) -> Path:
    arms = comparison["arms"]
    runs = [run for number, arm in enumerate(arms) for run in _runs(folder, number, arm)]
    first = runs[0].record if runs else None
    content = {
        "title": f"{', '.join(arm['name'] for arm in arms)} compared",
        "lead": _lead(comparison, first),
        "verdict": comparison["verdict"],
        "arms": [arm["name"] for arm in arms],
        "lines": comparison_lines(arms),
        "failures": [(arm["name"], arm["error"]) for arm in arms if arm["error"]],
        "plots": _plots(arms, runs),
        "samples": _side_by_side(runs),
        "ledger": ledger_lines(first["rows"]["ledger"]) if first else [],
        "mask": read_lines(runs[0].folder / "mask.jsonl") if runs else [],
        "environment": environment(first) if first else [],
        "differing": _differing(runs),
        "recipe": recipe_lines(first["recipe"]) if first else [],
        "skipped": skipped_note(sum(run.n_skipped for run in runs)),
    }
    for name in ("report.html", "report.md"):
        write_text(folder / name, fill(f"comparison.{name.rpartition('.')[2]}", content))
    by_label = {run.label: {"record": run.record, "events": run.events, "samples": run.samples} for run in runs}
    write_text(folder / "report.json", to_json({"comparison": comparison, "runs": by_label}, indent=1) + "\n")
    return folder / "report.html"


def rewrite_report(folder: Path) -> Path:
    """Write the report of a run or of a comparison, replacing an earlier one.

    Raises:
        InputError: the folder is neither a run nor a comparison.
    """
    return write_comparison_report(folder) if (folder / "comparison.json").is_file() else write_report(folder)


def comparison_lines(arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table: a label, then the value for each arm (see `nybble.comparison.Arm`)."""
    objectives = [arm.get("objective", "sft") for arm in arms]
    rows = [
        ("status", [_status(arm) for arm in arms]),
        ("method", [arm["method"] for arm in arms]),
        ("objective", objectives if set(objectives) != {"sft"} else ["–"] * len(arms)),
        ("learning rate", [", ".join(dict.fromkeys(_rate(r) for r in arm["learning_rates"])) for arm in arms]),
        ("held-out loss before", [format_number(arm["base_loss"]) for arm in arms]),
        ("held-out loss", [format_number(arm["eval_loss"]) for arm in arms]),
        ("95 % interval of the loss", [_span(arm["eval_loss_interval"], format_number) for arm in arms]),
        ("perplexity", [format_number(arm["perplexity"], 2) for arm in arms]),
        ("exact match", [format_share(arm["exact_match"]) for arm in arms]),
        ("95 % interval of exact match", [_span(arm["exact_match_interval"], format_share) for arm in arms]),
        ("held-out preference accuracy", [format_share(arm.get("preference_accuracy")) for arm in arms]),
        (
            "95 % interval of the accuracy",
            [_span(arm.get("preference_accuracy_interval"), format_share) for arm in arms],
        ),
        ("held-out pairs, chosen answer likelier", [format_share(arm.get("likelier")) for arm in arms]),
        ("training loss", [format_number(arm["train_loss"]) for arm in arms]),
        ("peak memory", [format_bytes(arm["peak_bytes"]) for arm in arms]),
        ("peak memory, reserved", [format_bytes(arm.get("reserved_bytes")) for arm in arms]),
        ("peak memory, predicted", [format_bytes(arm["predicted_bytes"]) for arm in arms]),
        ("bits per 4-bit weight", [format_number(arm["bits_per_weight"], 3) for arm in arms]),
        ("trained parameters", [format_count(arm["trainable_parameters"]) for arm in arms]),
        ("share of all parameters", [_share_trained(arm) for arm in arms]),
        ("tokens/s", [format_count(arm["tokens_per_second"]) for arm in arms]),
        ("wall time", [format_seconds(arm["seconds"]) for arm in arms]),
        ("time to the first step", [format_seconds(arm["seconds_to_first_step"]) for arm in arms]),
        ("size on disk", [format_bytes(arm["produced_bytes"]) for arm in arms]),
        ("seeds", [str(len(arm["seeds"])) for arm in arms]),
    ]
    if len({arm["device"] for arm in arms if arm["device"]}) > 1:
        rows.append(("device", [arm["device"] or "–" for arm in arms]))
    always = ("status", "method", "held-out loss")
    return [(what, *values) for what, values in rows if what in always or any(value != "–" for value in values)]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "comparison.json"
    if not file.is_file():
        raise InputError(
            f"{folder} is not a comparison (it has no comparison.json); give the folder of a `nybble compare`"
        )
    advice = "run the same `nybble compare` again to rewrite it"
    comparison = read_object(file, InputError, advice)
    with of_record(file):
        if not isinstance(comparison["verdict"], str):
            raise TypeError("verdict is not text")
        for name in [name for arm in comparison["arms"] for name in arm["run_dirs"]]:
            if as_path(name, InputError).name != name:
                raise InputError(f"{file}: names the run {shown(name)}; allowed are folders next to it; {advice}")
    return comparison


def _runs(folder: Path, number: int, arm: Mapping[str, Any]) -> list[_Run]:
    runs = []
    for name in arm["run_dirs"]:
        run_dir = folder / name
        if (run_dir / "run.json").is_file():
            events, n_skipped = read_events(run_dir)
            samples = [s for s in read_lines(run_dir / "samples.jsonl") if s.get("step") is None]
            runs.append(_Run(number, name, run_dir, read_record(run_dir), events, samples, n_skipped))
    return runs


def _lead(comparison: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    if first is None:
        return "not started"
    model = Path(first["recipe"]["model"]["model_name_or_path"]).name
    n_held_out = comparison["n_held_out"]
    rows = f" · {format_count(n_held_out)} held-out rows" if n_held_out else ""
    return f"{model} · {first['started']} · {first['device']['name']}{rows}"


def _status(arm: Mapping[str, Any]) -> str:
    if arm["status"] == "done":
        return "measured"
    return "predicted, not run" if arm["status"] == "does not fit" else str(arm["status"])


def _rate(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:.3g}"


def _span(interval: Mapping[str, float] | None, show: Any) -> str:
    return f"{show(interval['low'])} – {show(interval['high'])}" if interval else "–"


def _share_trained(arm: Mapping[str, Any]) -> str:
    trained = arm["trainable_parameters"]
    total = arm["total_parameters"]
    return f"{100 * trained / total:.2f} %" if trained and total else "–"


def _plots(arms: Sequence[Mapping[str, Any]], runs: Sequence[_Run]) -> list[tuple[str, str]]:
    evaluated = [arm for arm in arms if arm["eval_loss_interval"]]
    spans = [tuple(arm["eval_loss_interval"][key] for key in ("value", "low", "high")) for arm in evaluated]
    names = [arm["name"] for arm in evaluated]
    intervals = draw_intervals(names, spans, "held-out loss (nats per token), 95 % interval")

    def lines(points: Any) -> list[Line]:
        seen: set[int] = set()
        curves = []
        for run in runs:
            label = arms[run.arm]["name"] if run.arm not in seen else "_again"  # one entry per arm in the legend
            seen.add(run.arm)
            x, y = points(run.events)
            curves.append(Line(label, x, y, COLORS[run.arm % len(COLORS)], DASHES[run.arm % len(DASHES)]))
        return curves

    first = {run.arm: run for run in reversed(runs)}  # the prediction is the same for all seeds of an arm
    predicted = [
        line
        for arm, run in sorted(first.items())
        for line in predicted_line(f"{arms[arm]['name']}, predicted", run.record, run.events)
    ]
    drawn = (
        ("Held-out loss", intervals),
        ("Training loss", draw(lines(loss_points), "step", "loss (nats per token)", name="loss")),
        (
            "Peak memory since the previous log line",
            draw([*lines(memory_points), *predicted], "step", "memory (MB)", from_zero=True, name="memory"),
        ),
        ("Speed", draw(lines(speed_points), "step", "tokens/s", from_zero=True, name="speed")),
    )
    return [(title, svg) for title, svg in drawn if svg]


def _side_by_side(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """The prompts of the first run, each with the answers of its base and of the first run of each arm."""
    firsts = {run.arm: run for run in reversed(runs) if run.samples}
    chosen = [firsts[arm] for arm in sorted(firsts)]
    if not chosen:
        return []
    prompts = []
    for sample in chosen[0].samples:
        answers = [(f"base, as {chosen[0].label} loads it", sample["base"])]
        for run in chosen:
            same_prompt = next((s for s in run.samples if s["prompt"] == sample["prompt"]), None)
            if same_prompt is not None:
                answers.append((run.label, same_prompt["tuned"]))
        if sample.get("expected"):
            answers.append(("the row's answer", sample["expected"]))
        prompts.append({"prompt": sample["prompt"], "answers": answers})
    return prompts


def _differing(runs: Sequence[_Run]) -> list[tuple[str, ...]]:
    """The settings in which the arms differ, as rows: a heading, then name and the value for each arm."""
    firsts = {run.arm: run for run in reversed(runs)}
    tables = [dict(recipe_lines(firsts[arm].record["recipe"])) for arm in sorted(firsts)]
    if len(tables) < 2:
        return []
    names = [name for name in tables[0] if name not in _PER_RUN and len({table.get(name) for table in tables}) > 1]
    head = ("", *(firsts[arm].label for arm in sorted(firsts)))
    return [head, *((name, *(table.get(name, "–") for table in tables)) for name in names)] if names else []
