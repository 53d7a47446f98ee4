"""Every reader of files by others takes what is nearly right, and says so in its documented errors; a short share of
`tools/fuzz/run.py`, which feeds a million. Here too: JSON of any shape, by hypothesis."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.errors import NybbleError
from tools.fuzz import run as fuzz_run

FIRST = 10_000_000  # beyond the numbers of a full run: other inputs
# Reader -> inputs; all others take the default. Some go through slow libraries.
INPUTS = {"tokenizer": 20, "model config": 60, "report": 8, "chat template": 100, "recipe": 300, "foreign recipe": 200}
DEFAULT = 400
NAMES = (
    *("recipe", "foreign recipe", "rows, jsonl", "rows, json", "rows, csv", "rows, txt", "rows, parquet"),
    *("rows, arrow", "chat template"),
    *("safetensors header", "safetensors index", "4-bit state", "model config", "tokenizer", "adapter config"),
    *("adapter weights", "adapter note", "run record", "events", "report", "comparison", "questions"),
)
OF_TEXT = ("recipe", "foreign recipe", "rows, csv", "rows, txt", "tokenizer", "model config", "report")
OF_JSON = [name for name in NAMES if name not in OF_TEXT]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The program of `make fuzz`."""
    return fuzz_run


@pytest.fixture(scope="module")
def readers(fuzz: ModuleType) -> dict[str, Any]:
    """Name -> reader."""
    found: dict[str, Any] = fuzz.readers()
    return found


def test_every_reader_is_here(readers: dict[str, Any]) -> None:
    assert list(readers) == list(NAMES)
    assert sum(reader.inputs + reader.guided for reader in readers.values()) >= 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_what_is_nearly_right_ends_in_documented_errors(
    fuzz: ModuleType, readers: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "TRACED", 3)
    monkeypatch.setattr("nybble.data.templates.MOST_SECONDS", 0.02)  # many templates would take all they may
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = fuzz.run_changed(name, INPUTS.get(name, DEFAULT) / readers[name].inputs, FIRST)
    assert seen.failures == ()
    assert seen.refused > 0 or name == "events"  # whose lines are skipped, not refused
    assert seen.refused < seen.inputs


@pytest.mark.parametrize("name", OF_JSON)
def test_any_json_ends_in_documented_errors(readers: dict[str, Any], name: str, tmp_path: Path) -> None:
    reader = readers[name]
    for beside, content in reader.beside.items():
        (tmp_path / beside).write_bytes(content)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ANY_JSON)
    def read(value: Any) -> None:
        (tmp_path / reader.name).write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        with suppress(NybbleError):
            reader.read(tmp_path)

    read()


def test_a_reader_that_fails_is_found(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def faulty(folder: Path) -> None:
        data = (folder / "x").read_bytes()
        if data == b"greedy":
            bytearray(1 << 24)
        elif data:
            raise KeyError(data)

    reader = fuzz.Reader(1, [b""], fuzz.changed, faulty, "x")
    seen = fuzz.Seen("faulty", "changed")
    monkeypatch.setattr(fuzz, "TRACED", 1)
    for data in (b"", b"abc", b"greedy"):
        seen.take(reader, tmp_path, data)
    assert [failure.partition(" (")[0] for failure in seen.failures] == [
        "KeyError: b'abc'",
        next(f for f in seen.failures if "bytes for" in f).partition(" (")[0],
    ]
    assert (tmp_path / "fuzz-failures" / "faulty-changed-0").read_bytes() == b"abc"
