"""Write a run's report from its files: HTML (one file, no network), Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.reporting.events import (
    figure_points,
    held_out_points,
    loss_points,
    memory_points,
    predicted_line,
    read_events,
    speed_points,
)
from nybble.reporting.ledger import ledger_lines
from nybble.reporting.pages import fill, of_record
from nybble.reporting.plots import BLUE, GREEN, GREY, ORANGE, Line, draw
from nybble.run.directory import read_lines, read_record
from nybble.storage.atomic import write_text
from nybble.units import format_bytes, format_count, format_number, format_seconds, format_share

Figure = tuple[str, str, str]  # label, value of the base, value of the tuned model


def write_report(run_dir: Path) -> Path:
    """Write report.html, report.md and report.json into a run directory, which may belong to a running training.

    Raises:
        InputError: the folder is not a run directory, or its record is damaged.
    """
    record = read_record(run_dir)
    with of_record(run_dir / "run.json"):
        return _write(run_dir, record)


def _write(run_dir: Path, record: Mapping[str, Any]) -> Path:
    events, n_skipped = read_events(run_dir)
    samples = [s for s in read_lines(run_dir / "samples.jsonl") if s.get("step") is None]
    content = {
        "title": _title(record),
        "record": record,
        "status": _status(record),
        "comparison": _comparison(record),
        "facts": _facts(record),
        "ledger": ledger_lines(record["rows"]["ledger"]),
        "phases": _phases(record),
        "samples": samples,
        "plots": _plots(record, events),
        "recipe": recipe_lines(record["recipe"]),
        "mask": read_lines(run_dir / "mask.jsonl"),
        "environment": environment(record),
        "skipped": skipped_note(n_skipped),
    }
    for name in ("report.html", "report.md"):
        write_text(run_dir / name, fill(name, content))
    summary = {"record": record, "events": events, "samples": samples, "events_skipped": n_skipped}
    write_text(run_dir / "report.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return run_dir / "report.html"


def _title(record: Mapping[str, Any]) -> str:
    model = str(record["recipe"]["model"]["model_name_or_path"]).rstrip("/").rpartition("/")[2]
    return f"{record['recipe']['method']} of {model}"


def _comparison(record: Mapping[str, Any]) -> list[Figure]:
    base = record.get("evaluation_base") or {}
    tuned = record.get("evaluation_tuned") or {}
    rows: list[Figure] = [
        ("held-out loss (nats per token)", format_number(base.get("loss")), format_number(tuned.get("loss"))),
        ("perplexity", format_number(base.get("perplexity"), 2), format_number(tuned.get("perplexity"), 2)),
    ]
    if base.get("exact_match") is not None:
        rows.append(("exact match", format_share(base["exact_match"]), format_share(tuned.get("exact_match"))))
    return rows + preference_figures(base.get("preferences") or {}, tuned.get("preferences") or {})


def preference_figures(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Figure]:
    """What held-out pairs or rated answers say; empty without them."""
    rows: list[Figure] = []
    if tuned.get("likelier") is not None:
        what = "held-out pairs whose chosen answer is likelier"
        rows.append((what, format_share(base.get("likelier")), format_share(tuned["likelier"])))
    if tuned.get("accuracy") is not None:
        low, high = tuned.get("accuracy_low"), tuned.get("accuracy_high")
        span = "" if low is None or high is None else f" ({format_share(low)} to {format_share(high)})"
        was = format_share(base.get("accuracy"))
        rows.append(("held-out preference accuracy (95 % interval)", was, format_share(tuned["accuracy"]) + span))
    if tuned.get("margin") is not None:
        rows.append(("reward margin", format_number(base.get("margin"), 3), format_number(tuned["margin"], 3)))
    return rows


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    trainable = record.get("trainable_parameters")
    total = record.get("total_parameters")
    share = f" of {format_count(total)} ({100 * trainable / total:.2f} %)" if trainable and total else ""
    model = record.get("model") or {}
    bits = 8 * model["packed_bytes"] / model["packed_elements"] if model.get("packed_elements") else None
    speed = record.get("tokens_per_second")
    facts = [
        ("status", _status(record)),
        ("device", str(record["device"]["name"])),
        ("trained parameters", f"{format_count(trainable)}{share}"),
        ("training loss", format_number(record.get("train_loss"))),
        ("tokens/s", format_count(speed)),
        ("peak memory", format_bytes(record.get("peak_bytes"))),
        ("seconds to first step", format_number(record.get("seconds_to_first_step"), 1)),
        ("wall time", format_seconds(record.get("seconds"))),
    ]
    if processes := record.get("processes"):
        each = ", ".join(format_bytes(n) for n in processes["peak_bytes"])
        facts.insert(2, ("processes", f"{processes['count']}, {processes['distributed']}; peak of each: {each}"))
    if bits is not None:
        packed = f"{format_bytes(model['packed_bytes'])}, {bits:.3f} bits per weight"
        facts.insert(3, ("4-bit weights", packed))
    return facts


def _status(record: Mapping[str, Any]) -> str:
    status = str(record["status"])
    notes = record.get("notes")
    if status == "killed":
        return "killed: it is not finished, and its process is gone"
    return f"failed: {notes[-1]}" if status == "failed" and isinstance(notes, list) and notes else status


def environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of name and value: the device and the versions of libraries."""
    device = dict(record["device"])
    if "total_bytes" in device:
        device["total_bytes"] = format_bytes(device["total_bytes"])
    facts = {**device, **record.get("versions", {})}
    return [(name.removesuffix("_bytes").replace("_", " "), str(value)) for name, value in facts.items()]


def skipped_note(n_lines: int) -> str:
    """A note about damaged lines; "" if there are none."""
    what = "1 damaged line of events.jsonl was" if n_lines == 1 else f"{n_lines} damaged lines of events.jsonl were"
    return f"{what} skipped" if n_lines else ""


def _phases(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            name,
            format_bytes(phase.get("predicted_bytes")),
            format_bytes(phase["measured_bytes"]),
            format_seconds(phase["seconds"]),
        )
        for name, phase in record.get("phases", {}).items()
    ]


def _plots(record: Mapping[str, Any], events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    held_out = held_out_points(record, events)
    loss = draw(
        [
            Line("training rows", *loss_points(events), BLUE),
            Line("held-out rows", [x for x, _ in held_out], [y for _, y in held_out], ORANGE, "--", "o"),
        ],
        "step",
        "loss (nats per token)",
        name="loss",
    )
    memory = draw(
        [
            Line("peak since the previous log line", *memory_points(events), BLUE),
            *predicted_line("predicted", record, events),
        ],
        "step",
        "memory (MB)",
        from_zero=True,
        name="memory",
    )
    speed = draw([Line("tokens/s", *speed_points(events), GREY)], "step", "tokens/s", from_zero=True, name="speed")
    titled = (("Loss", loss), *_preference_plots(events), ("Memory", memory), ("Speed", speed))
    return [(title, svg) for title, svg in titled if svg]


def _preference_plots(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rewards of the answers, and how often the chosen one has the higher; empty drawings for other objectives."""
    rewards = draw(
        [
            Line("chosen (or good) answers", *figure_points(events, "rewards/chosen"), GREEN),
            Line("rejected (or bad) answers", *figure_points(events, "rewards/rejected"), ORANGE, "--"),
        ],
        "step",
        "reward",
        name="rewards",
    )
    accuracy = draw(
        [Line("right order", *figure_points(events, "rewards/accuracies"), BLUE)],
        "step",
        "share of pairs in the right order",
        from_zero=True,
        name="accuracy",
    )
    return [("Rewards", rewards), ("Preference accuracy", accuracy)]


def recipe_lines(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of setting and value; values are written as JSON."""
    flat: list[tuple[str, str]] = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat += [(f"{key}.{name}", json.dumps(inner, ensure_ascii=False)) for name, inner in value.items()]
        else:
            flat.append((key, json.dumps(value, ensure_ascii=False)))
    return flat
