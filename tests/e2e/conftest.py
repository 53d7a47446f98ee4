"""Runs of the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.cli.main import run as run_nybble
from nybble.diagnostics import rungs

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def nybble(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`nybble("train", ...)` as if typed."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = run_nybble([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def found_paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first training finds of this machine's paths."""
    return tmp_path_factory.mktemp("paths")


@pytest.fixture(autouse=True)
def _paths_are_kept(found_paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to look for; every other cache is a test's own."""
    monkeypatch.setattr(rungs, "_file", lambda fingerprint: found_paths / f"{fingerprint}.json")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """40 rows in [INST] form, of which the same question always has the same answer."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"text": f"<s>[INST] What is {NUMBERS[i % 8]}? [/INST] It is {NUMBERS[(i + 1) % 8]}. </s>", "answer": "x"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
