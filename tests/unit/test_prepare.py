"""Sets of rows: what is held out, who tokenizes, what is kept on disk, and that none of it changes a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nybble.data import Example, Prepared, encode_all, templates
from nybble.data.columns import Layout
from nybble.data.rows import _load_hub, _read_hub
from nybble.errors import CannotRunError, RowsError
from nybble.recipe import DataSection
from nybble.run.record import Silent
from nybble.storage.cache import Cache

Call = Callable[..., Prepared]
_TEXT = Layout("text", {"text": "text"})
NUMBERED = [{"text": f"<s>[INST] {i} [/INST] {i} </s>"} for i in range(40)]
MANY = [{"text": f"<s>[INST] {i % 600} [/INST] {'a' * (i % 50)} </s>", "answer": str(i)} for i in range(700)]


class Told(Silent):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.moves: list[tuple[str, int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.moves.append((what, done, total))


def ids_of(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    return [tuple(example.input_ids) for example in examples]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_hold_out_is_drawn_by_the_seed(prepare: Call) -> None:
    first, again, other = (prepare(NUMBERED, seed=seed, eval_fraction=0.25) for seed in (3, 3, 4))
    assert ids_of(first.held_out) == ids_of(again.held_out) != ids_of(other.held_out)
    assert (len(first.held_out), len(first.train)) == (10, 30) == (first.ledger.rows_held_out, first.ledger.rows_used)
    assert first.fingerprint == again.fingerprint == other.fingerprint


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_trained_on_and_held_out_even_if_it_is_there_twice(prepare: Call, seed: int) -> None:
    done = prepare(NUMBERED * 3, seed=seed, eval_fraction=0.1)
    assert done.held_out
    assert not set(ids_of(done.held_out)) & set(ids_of(done.train))
    assert set(ids_of(done.held_out)) | set(ids_of(done.train)) == set(ids_of(prepare(NUMBERED).train))


@pytest.mark.parametrize(
    ("n", "fraction", "most", "held"), [(40, 0.0, 9, 0), (1, 0.5, 9, 0), (2, 0.01, 9, 1), (40, 0.9, 3, 3)]
)
def test_the_hold_out_has_its_share_of_rows(prepare: Call, n: int, fraction: float, most: int, held: int) -> None:
    done = prepare(NUMBERED[:n], eval_fraction=fraction, max_eval_rows=most)
    assert (len(done.held_out), len(done.train)) == (held, n - held)


def test_rows_of_the_held_out_file_are_not_trained_on(prepare: Call, tmp_path: Path) -> None:
    write_lines(tmp_path / "held.jsonl", NUMBERED[5:8])
    done = prepare(NUMBERED, eval_dataset_name=str(tmp_path / "held.jsonl"), eval_fraction=0.5)
    assert (len(done.held_out), len(done.train)) == (3, 37)
    assert not set(ids_of(done.held_out)) & set(ids_of(done.train))
    assert (done.ledger.rows_dropped, [e.row for e in done.dropped]) == (3, [6, 7, 8])


def test_rows_that_are_all_held_out_say_so(prepare: Call) -> None:
    with pytest.raises(RowsError, match="every row is held out"):
        prepare([{"text": "a b"}] * 2, eval_fraction=0.5)


def test_every_row_is_accounted_for(prepare: Call) -> None:
    ledger = prepare(NUMBERED * 3, eval_fraction=0.1).ledger
    assert ledger.rows_read == ledger.rows_used + ledger.rows_dropped + ledger.rows_held_out


@pytest.mark.parametrize(
    ("name", "split"), [("validation.jsonl", "validation"), ("sub/dev-00001.jsonl", "val"), ("My_Test.jsonl", "test")]
)
def test_a_folders_split_may_be_held_out(prepare: Call, tmp_path: Path, name: str, split: str) -> None:
    folder = tmp_path / "set"
    write_lines(folder / "latest.jsonl", NUMBERED[:20])
    write_lines(folder / name, NUMBERED[18:24])
    write_lines(folder / ".hidden" / "x.jsonl", [{"no": "row"}])
    settings = {"dataset_name": str(folder), "eval_dataset_split": split}
    done = prepare([], **settings)
    assert (len(done.held_out), len(done.train), done.ledger.rows_dropped) == (6, 18, 2)
    assert ids_of(prepare([], dataset_name=str(folder), dataset_split=split).train) == ids_of(done.held_out)
    apart = prepare(NUMBERED, eval_dataset_name=str(folder), eval_dataset_split=split)
    assert (len(apart.held_out), len(apart.train)) == (6, 34)


def test_a_split_that_is_not_there_is_named_with_those_that_are(prepare: Call, tmp_path: Path) -> None:
    write_lines(tmp_path / "set" / "train.jsonl", NUMBERED)
    write_lines(tmp_path / "set" / "eval.jsonl", NUMBERED)
    with pytest.raises(RowsError, match="has no split 'validation'; according to its file names it has: test, train"):
        prepare([], dataset_name=str(tmp_path / "set"), eval_dataset_split="validation")


def test_one_file_has_no_splits(prepare: Call) -> None:
    with pytest.raises(RowsError, match="is one file and has no splits; remove --eval_dataset_split"):
        prepare(NUMBERED, eval_dataset_split="test")


@pytest.mark.parametrize("limit", [None, 3])
def test_a_set_of_the_hub_is_read_by_split_and_no_further_than_its_limit(tmp_path: Path, limit: int | None) -> None:
    write_lines(tmp_path / "train.jsonl", NUMBERED[:5])
    write_lines(tmp_path / "test.jsonl", NUMBERED[10:20])
    found = _load_hub(str(tmp_path), "test", limit, None)  # a folder takes the place of the hub
    assert hasattr(found, "__len__") == (limit is None)
    for _ in range(2):
        assert list(_read_hub("some/rows", found, limit)) == [
            (f"some/rows row {number}", row) for number, row in enumerate(NUMBERED[10 : 10 + (limit or 10)], start=1)
        ]
    with pytest.raises(RowsError, match="Unknown split"):
        _load_hub(str(tmp_path), "dev", None, None)


def test_one_of_a_hub_ids_sets_is_read(tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert list(_load_hub(str(tmp_path), "train", None, "b")) == [{"text": "b"}]
    with pytest.raises(RowsError, match=r"pick one among the available configs: \['a', 'b'\] .* set --dataset_config"):
        _load_hub(str(tmp_path), "train", None, None)


@pytest.mark.parametrize("settings", [{}, {"max_length": 24, "overlong": "split", "eval_fraction": 0.2}], ids=str)
def test_the_number_of_workers_changes_nothing(
    prepare: Call, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_all, "CHUNK", 20)
    one, two, three = (prepare(MANY, dataset_num_proc=n, **settings) for n in (1, 2, 3))
    assert list(one.train) == list(two.train) == list(three.train)
    assert list(one.held_out) == list(two.held_out) == list(three.held_out)
    assert one.ledger == two.ledger == three.ledger
    assert [e.answer for e in one.train] == [str(e.row - 1) for e in one.train]


def test_workers_are_other_processes_and_progress_is_told(
    prepare: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encode_all.Encoder.encode

    def spy(self: encode_all.Encoder, chunk: Any) -> Any:
        (tmp_path / f"{os.getpid()}.{chunk[0]}").touch()
        return encode(self, chunk)

    monkeypatch.setattr(encode_all.Encoder, "encode", spy)
    told = Told()
    prepare(MANY, dataset_num_proc=2, watch=told)
    by = [file.name.split(".") for file in tmp_path.glob("*.*") if file.suffix != ".jsonl"]
    assert sorted(int(before) for _, before in by) == [0, 250, 500]
    assert str(os.getpid()) not in {process for process, _ in by}
    assert told.moves == [("tokenizing", 250, 700), ("tokenizing", 500, 700), ("tokenizing", 700, 700)]


def test_long_rows_go_to_the_workers_in_smaller_chunks(prepare: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_all, "_CHUNK_BYTES", 300)
    told = Told()
    rows = [{"text": "a" * 90}] * 12  # 102 bytes each as JSON
    assert len(prepare(rows, dataset_num_proc=3, watch=told).train) == 12
    assert [done for _, done, _ in told.moves] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_cannot_be_used_is_named_from_afar_and_leaves_nothing(
    prepare: Call, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = [*MANY[:640], {"text": 3}, *MANY[641:]]
    for cache in (Cache("rows", 1 << 30), None):
        with pytest.raises(RowsError, match=r"rows.jsonl row 641: column 'text' is of type int"):
            prepare(rows, dataset_num_proc=workers, cache=cache)
    assert list((tmp_path / "cache" / "rows").iterdir()) == []
    assert list(tmp_path.glob("nybble-*")) == []


def test_a_worker_that_is_killed_is_said(prepare: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_all.Encoder, "encode", lambda _self, _chunk: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(CannotRunError, match="set --dataset_num_proc 1"):
        prepare(MANY, dataset_num_proc=2)


class TestKept:
    """What the cache holds."""

    @pytest.fixture
    def notes(self, prepare: Call) -> Callable[..., list[str]]:
        """`notes(rows, **settings)` -> what a preparation with the cache says; its tokens are those without."""

        def run(rows: list[dict[str, Any]] = MANY, **settings: Any) -> list[str]:
            told = Told()
            kept = prepare(rows, cache=Cache("rows", 1 << 30), watch=told, **settings)
            assert list(kept.train) == list(prepare(rows, **settings).train)
            assert bool(told.moves) == (len(rows) > 250 and not any("loaded from" in note for note in told.notes))
            return told.notes

        return run

    def test_the_second_time_nothing_is_tokenized(self, notes: Callable[..., list[str]]) -> None:
        assert notes() == []
        assert "loaded from the cache" in notes()[0]
        assert "loaded from the cache" in notes(dataset_num_proc=1)[0]

    @pytest.mark.parametrize(
        "changed",
        [
            {"max_length": 20},
            {"loss_on": "all"},
            {"overlong": "split", "max_length": 20},
            {"rows": MANY[1:]},
            {"rows": [*MANY[:-1], {"text": "x"}]},
            {"chat_template": "inst"},
        ],
        ids=str,
    )
    def test_any_change_is_another_entry(self, notes: Callable[..., list[str]], changed: dict[str, Any]) -> None:
        notes()
        assert notes(**changed) == []
        assert "loaded from the cache" in notes(**changed)[0]

    def test_another_tokenizer_or_version_is_another_entry(
        self, notes: Callable[..., list[str]], tok: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes()
        tok.add_tokens(["[INST]"])
        assert notes() == []
        tok.eos_token = "<unk>"  # noqa: S105
        assert notes() == []
        assert "loaded from the cache" in notes()[0]
        monkeypatch.setattr(encode_all, "_VERSION", encode_all._VERSION + 1)
        assert notes() == []

    def test_the_key_is_of_everything_that_decides_the_tokens(self, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def key(layout: Layout = _TEXT, answer_field: str = "answer", **data: Any) -> str:
            return encode_all.Encoder(tok, layout, DataSection(**data), answer_field).key()

        decide: list[dict[str, Any]] = [
            {}, {"layout": Layout("text", {"text": "t"})}, {"layout": Layout("alpaca", {"text": "text"})},
            {"layout": replace(_TEXT, given={"system": "s"})}, {"answer_field": "a"},
            {"layout": replace(_TEXT, ignored=frozenset({"system"}))}, {"loss_on": "last_answer"},
            {"overlong": "drop"}, {"max_length": 9}, {"on_bad_row": "skip"},
        ]  # fmt: skip
        assert len({key(**changed) for changed in decide}) == len(decide)
        assert key(dataset_name="x", eval_fraction=0.5, dataset_num_proc=3) == key()
        keys = set()
        for template in ("{{ strftime_now('%d') }}", "{{ messages }}"):
            tok.chat_template = template
            for day in (1, 2):  # a template may tell the date
                now = datetime(2026, 1, day, tzinfo=UTC)
                monkeypatch.setattr(templates, "template_clock", lambda now=now: now)
                keys.add(key())
        assert len(keys) == 3

    @pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
    def test_a_damaged_entry_is_made_again(self, notes: Callable[..., list[str]], tmp_path: Path, harm: str) -> None:
        notes()
        (file,) = (tmp_path / "cache" / "rows").glob("*/examples.arrow")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if harm == "flip" else content[:-1])
        if harm == "gone":
            file.unlink()
        assert notes() == []
        assert "loaded from the cache" in notes()[0]

    def test_a_full_disk_is_said_and_not_fatal(
        self, notes: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert "the tokenized data is not cached" in notes()[0]
        assert list(tmp_path.glob("nybble-*")) == []

    def test_few_rows_are_not_worth_keeping(self, notes: Callable[..., list[str]], tmp_path: Path) -> None:
        notes(MANY[:250], dataset_num_proc=2)
        assert not (tmp_path / "cache").exists()


def test_examples_are_a_sequence(prepare: Call) -> None:
    train = prepare(MANY).train
    whole = list(train)
    assert len(train) == len(whole) == 700
    assert (train[0], train[-1], train[699]) == (whole[0], whole[-1], whole[-1])
    assert list(train[5:600:7]) == whole[5:600:7]
    assert train.take(np.array([3, 1]))[1] == whole[1]
    assert train.column("length").tolist() == [len(example.input_ids) for example in whole]
    with pytest.raises(IndexError):
        train[700]
