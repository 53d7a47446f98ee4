"""The harness of the measurements, and that every measurement can be imported."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import harness
from bench.harness import Option

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("bench", "tools")
    for file in (ROOT / folder).rglob("*.py")
    if file.name != "__init__.py" and "triton" not in file.read_text(encoding="utf-8")
    if file != ROOT / "tools/forking/client.py"  # text that follows two lines which are written at run time
)
OPTIONS = (Option("size", 4096, tiny=16), Option("arms", ("a", "b")), Option("quick", False))


def parse(monkeypatch: pytest.MonkeyPatch, *words: str, **more: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return vars(harness.parse("bench.speed.engine", "What it does.", OPTIONS, **more))


@pytest.mark.parametrize("name", MODULES)
def test_every_measurement_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_tiny_takes_the_smallest_sizes_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"size": 4096, "arms": ("a", "b"), "quick": False, "tiny": False, "save": False}
    assert parse(monkeypatch) == usual
    assert parse(monkeypatch, "--tiny") == {**usual, "size": 16, "tiny": True}
    assert parse(monkeypatch, "--tiny", "--size", "7", "--arms", "c", "--quick")["size"] == 7
    assert parse(monkeypatch, "--arms", "c,d")["arms"] == ("c", "d")


def test_data_is_asked_for_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, data=True)
    assert "--data" in capsys.readouterr().err
    assert parse(monkeypatch, data=None)["data"] is None
    assert parse(monkeypatch, "held", parts=("held", "live"))["part"] == "held"


def test_sides_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def side(name: str, figures: list[float]) -> Any:
        return lambda: calls.append(name) or {"x": figures[calls.count(name) - 1]}

    found = harness.medians({"a": side("a", [99, 1, 2, 9]), "b": side("b", [99, 4, 5, 6])}, 3, quiet=True)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found == {"a": {"x": 2}, "b": {"x": 5}}
    calls.clear()
    assert harness.medians({"a": side("a", [7])}, 1, warm_up=False, quiet=True) == {"a": {"x": 7}}


def test_a_command_is_watched() -> None:
    hold = "x = bytearray(200_000_000); import time; time.sleep(0.5); print('out')"
    output, spent = harness.watch([sys.executable, "-c", hold])
    assert output == "out\n"
    assert 200e6 < spent["peak_bytes"] < 300e6
    assert spent["seconds"] > spent["processor_seconds"] > 0
    with pytest.raises(SystemExit, match="exit code 3"):
        harness.watch([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_function_is_called_in_a_fresh_process() -> None:
    assert harness.fresh("math", "hypot", 3, 4) == 5.0
    with pytest.raises(SystemExit, match="ValueError"):
        harness.fresh("math", "sqrt", -1)


def test_a_result_says_what_ran_where_and_when(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--save"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    measure = eval("lambda asked: {'figure': asked.size}", {"__spec__": SimpleNamespace(name="bench.speed.engine")})  # noqa: S307
    harness.run(measure, "What it does.", *OPTIONS)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == [
        "benchmark", "command", "date", "device", "machine", "versions", "settings", "results",
    ]  # fmt: skip
    assert result["benchmark"] == "engine"
    assert result["results"] == {"figure": 16}
    file = tmp_path / f"engine-{harness.machine_name()}-{result['date']}.json"
    assert json.loads(file.read_text()) == result


def test_a_result_names_no_folder_of_one_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path / "here")
    assert harness.portable(f'{{"data": "{tmp_path}/data", "other": "/tmp"}}') == '{"data": "../data", "other": "/tmp"}'
