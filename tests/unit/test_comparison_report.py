"""The report of a comparison, from a folder written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.errors import InputError
from nybble.reporting import comparison_lines, rewrite_report, write_comparison_report
from nybble.run.directory import RunDirectory
from nybble.run.record import Phase, Sample, StepEvent

HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>'
SPAN = {"value": 1.0, "low": 0.9, "high": 1.1}
FIGURES = (
    *("error", "base_loss", "eval_loss", "eval_loss_interval", "perplexity", "exact_match", "exact_match_interval"),
    *("train_loss", "peak_bytes", "predicted_bytes", "device", "seconds", "seconds_to_first_step"),
    *("tokens_per_second", "trainable_parameters", "total_parameters", "bits_per_weight", "produced_bytes"),
)


def arm(name: str, **changes: Any) -> dict[str, Any]:
    known = {"name": name, "method": name, "status": "waiting", "measured": False, "seeds": [], "run_dirs": [name]}
    rates = {"learning_rates": [2e-4], "learning_rate_source": "the recipe's"}
    return {**dict.fromkeys(FIGURES), **known, **rates, **changes}


def done(name: str, **changes: Any) -> dict[str, Any]:
    figures = {"eval_loss": 1.0, "eval_loss_interval": SPAN, "peak_bytes": 9_000_000, "device": "a CPU", "seeds": [42]}
    return arm(name, status="done", measured=True, **{**figures, **changes})


def write_folder(folder: Path, *arms: dict[str, Any], verdict: str = "It depends.") -> str:
    folder.mkdir(exist_ok=True)
    content = {"arms": arms, "verdict": verdict, "differences": [], "same_rows": True, "n_held_out": 8}
    (folder / "comparison.json").write_text(json.dumps(content))
    return write_comparison_report(folder).read_text(encoding="utf-8")


def write_run(folder: Path, written: Any, n_events: int, answer: str = "yes") -> None:
    run = RunDirectory(folder)
    run.create()
    run.write_record(written)
    for step in range(1, n_events + 1):
        run.append_event(StepEvent(step, 9, 2 / step, 1e-4, 0.5, 100 * step, 0.5 * step, 1_000_000))
    run.append_sample(Sample("Is it?", "no", answer, "yes"))


@pytest.fixture
def finished(request: pytest.FixtureRequest) -> Any:
    """The records of the runs' own reports."""
    import importlib.util

    file = Path(__file__).with_name("test_report.py")
    spec = importlib.util.spec_from_file_location("report_of_a_run", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_stand_side_by_side(tmp_path: Path, finished: Any) -> None:
    for name, answer in (("qlora", "yes"), ("full", "perhaps")):
        write_run(tmp_path / name, finished.finished(), 5, answer)
    text = write_folder(tmp_path, done("qlora"), done("full", eval_loss=1.2345))
    for shown in (
        "It depends.",
        "1.2345",
        "0.9000 – 1.1000",
        "9.00 MB",
        "perhaps",
        "Is it?",
        "base, as qlora loads it",
    ):
        assert shown in text
    assert text.count("<svg") == 4  # intervals, loss, memory, speed
    finished.assert_loads_nothing(text)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| held-out loss | 1.0000 | 1.2345 |" in markdown
    summary = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert summary["runs"].keys() == {"qlora", "full"}


def test_the_table_of_the_markdown_is_one(tmp_path: Path) -> None:
    write_folder(tmp_path, done("qlora"), done("full"))
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| |"))
    table = lines[first : first + 5]
    assert [line.count("|") for line in table] == [4] * 5
    assert table[1] == "|---|---|---|"


def test_what_differs_between_the_recipes_is_shown(tmp_path: Path, finished: Any) -> None:
    write_run(tmp_path / "qlora", finished.finished(), 2)
    other = finished.finished()
    other.recipe["lora"]["r"] = 77
    write_run(tmp_path / "full", other, 2)
    text = write_folder(tmp_path, done("qlora"), done("full"))
    assert "<th><code>lora.r</code></th>" in text.partition("every setting")[0]
    assert "<th><code>lora.lora_alpha</code></th>" not in text.partition("every setting")[0]


def test_hostile_text_is_text(tmp_path: Path, finished: Any) -> None:
    written = finished.finished(device={"name": HOSTILE}, versions={HOSTILE: HOSTILE})
    write_run(tmp_path / "qlora", written, 3, HOSTILE)
    failed = arm("full", status="failed", error=HOSTILE)
    text = write_folder(tmp_path, done("qlora", device=HOSTILE), failed, verdict=HOSTILE)
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    finished.assert_loads_nothing(text)


def test_a_comparison_under_way_has_a_report(tmp_path: Path, finished: Any) -> None:
    assert "waiting" in write_folder(tmp_path, arm("qlora"), arm("lora"))
    write_run(tmp_path / "qlora", finished.record(), 3)
    text = rewrite_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("<svg") == 3  # no interval yet


def test_what_crashed_or_does_not_fit_is_marked(tmp_path: Path) -> None:
    crashed = arm("lora", status="failed", error="boom")
    large = arm("full", status="does not fit", error="needs more", predicted_bytes=128_000_000_000)
    text = write_folder(tmp_path, done("qlora"), crashed, large)
    for shown in ("boom", "predicted, not run", "128.00 GB", "failed"):
        assert shown in text


def test_damaged_lines_are_counted(tmp_path: Path, finished: Any) -> None:
    write_run(tmp_path / "qlora", finished.finished(), 3)
    with (tmp_path / "qlora" / "events.jsonl").open("a") as file:
        file.write("{broken\n")
    assert "1 damaged line of events.jsonl was skipped" in write_folder(tmp_path, done("qlora"))


def test_the_predicted_memory_of_an_arm_is_drawn(tmp_path: Path, finished: Any) -> None:
    write_run(tmp_path / "qlora", finished.finished(phases={"train": Phase(7_000_000, 9_000_000, 75.0)}), 3)
    assert "qlora, predicted" in write_folder(tmp_path, done("qlora"))


def test_rows_without_a_figure_are_left_out() -> None:
    lines = {what: values for what, *values in comparison_lines([done("qlora"), arm("full")])}
    assert "exact match" not in lines
    assert lines["held-out loss"] == ["1.0000", "–"]
    assert lines["status"] == ["measured", "waiting"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"arms": [{}], "verdict": "x"}', '{"arms": [], "verdict": 3}'])
def test_a_damaged_comparison_is_refused_in_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(InputError, match=r"comparison\.json is damaged"):
        rewrite_report(tmp_path)


def test_no_comparison_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a comparison"):
        write_comparison_report(tmp_path)
    with pytest.raises(InputError, match="is not a run directory"):
        rewrite_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
