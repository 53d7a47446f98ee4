"""Reports from run directories written by hand: nothing foreign is run or fetched, whatever the run holds."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nybble.data import Ledger
from nybble.errors import InputError
from nybble.recipe import load_recipe
from nybble.reporting import write_report
from nybble.reporting.events import held_out_points
from nybble.run.directory import RunDirectory
from nybble.run.record import Evaluation, Phase, PreferenceFigures, RunRecord, Sample, StepEvent

HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>&lt;{{ 7 * 7 }}'
LOADERS = {"src", "href", "xlink:href", "srcset", "data", "action", "formaction", "poster", "background", "ping"}


def record(**changes: Any) -> RunRecord:
    """What run.json holds when the run has just begun."""
    samples = {"str": "text", "dict[str, int]": {"answer": 3}, "tuple[str, ...]": ["text"]}
    ledger = {field.name: samples.get(str(field.type), 3) for field in fields(Ledger)}
    ledger |= {"not_used": {"<b>": 3}, "notes": {"joined": 1}, "files_not_read": ["x.txt"], "skipped": ["row 2: bad"]}
    ledger |= {"sets": {"a.jsonl": {"rows_used": 3, "tokens_trained": 3}}}
    recipe = load_recipe(None, {"model_name_or_path": "models/tiny", "dataset_name": "rows.jsonl"})
    values: dict[str, Any] = {
        "status": "running",
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"torch": "2.13"},
        "device": {"name": "a CPU"},
        "rows": {"ledger": ledger, "sha256": "0" * 64},
        "plan": {},
        "model": {},
        "started": "2026-01-01T00:00:00+00:00",
    }
    return RunRecord(**{**values, **changes})


def finished(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "status": "done",
        "model": {"packed_bytes": 4127, "packed_elements": 8000},
        "phases": {"load": Phase(None, 5_000_000, 1.5), "train": Phase(7, 9_000_000, 75.0)},
        "trainable_parameters": 4_194_304,
        "total_parameters": 6_742_609_920,
        "train_loss": 0.75,
        "tokens_per_second": 1234.0,
        "peak_bytes": 9_000_000,
        "seconds": 80.0,
        "seconds_to_first_step": 3.25,
        "evaluation_base": Evaluation(2.5, 12.18, 10, 100, 0.1, 1.0),
        "evaluation_tuned": Evaluation(0.5, 1.65, 10, 100, 0.9, 1.0),
    }
    return record(**{**values, **changes})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def write(run: RunDirectory, written: RunRecord, n_events: int = 0, sample: Sample | None = None) -> str:
    """The page of a run directory made by hand."""
    run.write_record(written)
    for step in range(1, n_events + 1):
        eval_loss = 1.0 if step == 2 else None
        run.append_event(StepEvent(step, 9, 2 / step, 1e-4, 0.5, 100 * step, 0.5 * step, 1_000_000, eval_loss))
    if sample is not None:
        run.append_sample(sample)
    page = write_report(run.path)
    assert page == run.path / "report.html"
    return page.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags of a page, and what its attributes would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in LOADERS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def assert_loads_nothing(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video"} & set(page.tags)
    assert page.handlers == []
    assert [value for value in page.loaded if not value.startswith("#")] == []
    assert [value for value in re.findall(r"url\(\s*['\"]?([^)]*)\)", text) if not value.startswith("#")] == []
    assert "@import" not in text


def test_a_finished_runs_report_shows_its_figures(run: RunDirectory) -> None:
    text = write(run, finished(), 5, Sample("Is it?", "no", "yes", "yes"))
    for shown in (
        "qlora of tiny",
        "2.5000",
        "0.5000",
        "10.0 %",
        "90.0 %",
        "4,194,304",
        "9.00 MB",
        "1 min 15 s",
        "Is it?",
    ):
        assert shown in text
    assert "4.127 bits per weight" in text
    markdown = (run.path / "report.md").read_text(encoding="utf-8")
    assert "| held-out loss (nats per token) | 2.5000 | 0.5000 |" in markdown
    assert "Is it?" in markdown


def test_the_json_report_is_record_events_and_samples(run: RunDirectory) -> None:
    written = finished()
    write(run, written, 3, Sample("p", "a", "b"))
    summary = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    assert summary["record"] == json.loads(json.dumps(written.to_json()))
    assert [event["step"] for event in summary["events"]] == [1, 2, 3]
    assert [sample["tuned"] for sample in summary["samples"]] == ["b"]


def test_samples_on_the_way_are_not_shown_as_the_result(run: RunDirectory) -> None:
    run.append_sample(Sample("p", "a", "half-way", step=2))
    text = write(run, finished(), 3, Sample("p", "a", "at the end"))
    assert "half-way" not in text
    assert "at the end" in text


def test_hostile_text_is_text(run: RunDirectory) -> None:
    changes: dict[str, Any] = {"notes": [HOSTILE], "device": {"name": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    written = finished(**changes)
    written.recipe["model"]["model_name_or_path"] = HOSTILE
    written.recipe["training"]["run_name"] = HOSTILE
    text = write(run, written, 3, Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    assert text.count("&lt;script&gt;") >= 9
    assert "{{ 7 * 7 }}" in text
    assert_loads_nothing(text)


@pytest.mark.parametrize("n_events", [0, 1, 5])
def test_the_page_loads_nothing(run: RunDirectory, n_events: int) -> None:
    assert_loads_nothing(write(run, finished(), n_events, Sample("p", "a", "b")))


def test_curves_are_svg_inside_the_page_with_ids_of_their_own(run: RunDirectory) -> None:
    text = write(run, finished(), 5)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 3  # loss, memory, speed
    ids = [node.attrib["id"] for svg in drawings for node in ElementTree.fromstring(svg).iter() if "id" in node.attrib]  # noqa: S314
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert referred <= set(ids)


def test_a_preference_run_shows_rewards_and_what_held_out_pairs_say(run: RunDirectory) -> None:
    was, now = Evaluation(2.5, 12.18, 10, 100, 0.1, 1.0), Evaluation(0.5, 1.65, 10, 100, 0.9, 1.0)
    base = replace(was, preferences=PreferenceFigures(20, 0.4))
    after = PreferenceFigures(20, 0.75, 0.85, 0.7, 0.95, 0.5, -0.25, 0.75, -0.1)
    tuned = replace(now, preferences=after)
    for step in (1, 2):
        rewards = {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.2, "rewards/accuracies": 0.5}
        run.append_event(StepEvent(step, 2, 0.6, 1e-4, 0.5, 100 * step, 0.5 * step, 1_000_000, figures=rewards))
    text = write(run, finished(evaluation_base=base, evaluation_tuned=tuned))
    for said in ("40.0 %", "75.0 %", "85.0 % (70.0 % to 95.0 %)", "0.750", "Rewards", "Preference accuracy"):
        assert said in text
    assert len(re.findall(r"<svg", text)) == 5
    assert_loads_nothing(text)


def test_the_same_run_gives_the_same_bytes(run: RunDirectory) -> None:
    first = write(run, finished(), 4)
    assert write_report(run.path).read_text(encoding="utf-8") == first


def test_a_run_that_has_just_begun_has_a_report(run: RunDirectory) -> None:
    with run.held():
        text = write(run, record())
    assert "· running</p>" in text
    assert "<svg" not in text
    assert {file.name for file in run.path.iterdir()} == {"run.json", "report.html", "report.md", "report.json"}


def test_a_run_under_way_has_a_report_with_curves(run: RunDirectory) -> None:
    base = Evaluation(2.5, 12.18, 10, 100, None, 1.0)
    text = write(run, record(evaluation_base=base, phases={"load": Phase(None, 5, 1.0)}), 2)
    assert "<svg" in text
    assert "exact match" not in text


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "killed: it is not finished, and its process is gone"),
        ({"status": "failed", "notes": ["an earlier note", "the loss is not a number"]}, "failed: the loss is not"),
    ],
)
def test_the_status_says_why_there_is_no_result(run: RunDirectory, changes: dict[str, Any], shown: str) -> None:
    text = write(run, record(**changes))
    assert "· running</p>" not in text
    assert shown in text


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_a_short_run_has_curves(run: RunDirectory, n_steps: int) -> None:
    text = write(run, finished(weights_step=n_steps), n_steps)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 3
    marks = [svg for svg in drawings if re.search(r"<use [^>]*(stroke|fill): #(0072b2|777777)", svg)]
    assert len(marks) == {1: 3, 2: 1, 3: 0}[n_steps]  # a curve of one point has no line


@pytest.mark.parametrize(
    ("weights_step", "expected"),
    [
        (5, [(0, 2.5), (2, 1.0), (5, 0.5)]),
        (2, [(0, 2.5), (2, 0.5)]),  # the best weights were loaded at the end
        (None, [(0, 2.5), (2, 1.0), (4, 0.5)]),  # of an older version: the last step that was logged
    ],
)
def test_the_tuned_models_loss_stands_at_the_step_of_its_weights(
    weights_step: int | None, expected: list[tuple[int, float]]
) -> None:
    events = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "eval_loss": 1.0}, {"step": 4, "loss": 1.5}]
    assert held_out_points(finished(weights_step=weights_step).to_json(), events) == expected


def test_a_line_cut_short_does_not_stop_the_report(run: RunDirectory) -> None:
    write(run, record(), 2)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    assert "<svg" in write_report(run.path).read_text(encoding="utf-8")


def test_damaged_lines_are_skipped_and_counted(run: RunDirectory) -> None:
    write(run, record(), 3)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"step": 4, "los\n[1, 2]\n{"step": "x", "loss": 1}\n\n')
    assert "3 damaged lines of events.jsonl were skipped" in write_report(run.path).read_text(encoding="utf-8")
    assert "3 damaged lines" in (run.path / "report.md").read_text(encoding="utf-8")
    summary = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    assert (len(summary["events"]), summary["events_skipped"]) == (3, 3)


def test_a_prediction_is_drawn_and_tabled_beside_what_was_measured(run: RunDirectory) -> None:
    text = write(run, finished(phases={"train": Phase(7_000_000, 9_000_000, 75.0)}), 5)
    assert ">predicted</text>" in text
    assert "7.00 MB" in text
    assert ">predicted</text>" not in write(run, finished(phases={"train": Phase(None, 9_000_000, 75.0)}), 5)


def test_what_is_learned_of_some_rows_is_shown(run: RunDirectory) -> None:
    parts = [{"text": HOSTILE, "is_learned": False, "is_control": False}]
    parts += [{"text": "Yes.", "is_learned": True, "is_control": False}]
    run.write_mask([{"row": 7, "trained": 2, "tokens": 9, "truncated": True, "parts": parts}])
    text = write(run, finished(), 2)
    assert '<span class="learned ">Yes.</span>' in text
    assert "row 7: 2 of 9 tokens learned, cut" in text
    assert "<script" not in text.lower()


def test_a_loss_that_is_not_a_number_does_not_stop_the_report(run: RunDirectory) -> None:
    run.append_event(StepEvent(1, 9, float("nan"), 1e-4, float("inf"), 100, 0.5, 1))
    assert "<svg" in write(run, record(status="failed", notes=["the loss is not a number"]), 3)


def test_rows_without_held_out_rows_have_dashes(run: RunDirectory) -> None:
    assert "–" in write(run, finished(evaluation_base=None, evaluation_tuned=None), 2)


def test_no_run_directory_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_without_rows_is_refused(run: RunDirectory) -> None:
    (run.path / "run.json").write_text('{"status": "done", "recipe": {}}')
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(run.path)
