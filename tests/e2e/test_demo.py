"""The main job: the demo learns a real skill through 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_demo_learns_to_answer(nybble: Callable[..., Any], tmp_path: Path) -> None:
    """In half the passes over the rows, and asked half of the held-out questions."""
    shorter = ("--num_train_epochs", 3, "--max_eval_rows", 100)
    done = nybble("demo", "--no-compare", "--output_dir", tmp_path / "demo", "--device", "cpu", "--json", *shorter)
    assert done.code == 0, done.err
    assert "about a minute on two idle cores" in done.err
    figures = done.json
    assert figures["exact_match_base"] <= 0.10
    assert figures["exact_match_tuned"] >= 0.70
    assert figures["eval_loss_tuned"] < figures["eval_loss_base"]
    assert figures["total_parameters"] < 4_000_000
    wanted = {"trainable_parameters", "peak_bytes", "tokens_per_second", "seconds", "run_dir"}
    assert wanted <= figures.keys()
    assert (Path(figures["run_dir"]) / "report.html").is_file()
