"""`nybble data`: the ledger and the mask, without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import nybble as library
from nybble.run import progress


@pytest.fixture
def tokenizer_only(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a tokenizer and nothing else."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny_llama().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def words(tokenizer_only: Path, rows_file: Path) -> tuple[object, ...]:
    return ("data", "--model_name_or_path", tokenizer_only, "--dataset_name", rows_file)


def test_json_is_one_object_and_nothing_else(nybble: Callable[..., Any], words: tuple[object, ...]) -> None:
    done = nybble(*words, "--show", 3, "--json", "--eval_fraction", "0")
    assert done.code == 0, done.err
    assert list(done.json) == ["ledger", "rows"]
    assert [row["row"] for row in done.json["rows"]] == [1, 2, 3]
    ledger = done.json["ledger"]
    assert (ledger["rows_read"], ledger["rows_used"], ledger["rows_duplicate"]) == (40, 40, 32)
    assert (ledger["turns"], ledger["stop_tokens_trained"], ledger["stop_token_trained_fraction"]) == (40, 40, 1.0)
    assert ledger["tokens_masked"] == ledger["tokens_total"] - ledger["tokens_trained"]
    row = done.json["rows"][0]
    assert {"row", "tokens", "trained", "stops", "truncated"} <= row.keys()
    assert (row["stops"], row["truncated"]) == (1, False)
    assert 0 < row["trained"] < row["tokens"]
    answer, end = row["spans"]
    assert (answer["kind"], answer["end"] - answer["first"], end["kind"]) == ("answer", row["trained"] - 1, "end")
    assert (end["first"], end["end"]) == (answer["end"], len(row["input_ids"]))
    assert row["input_ids"][end["first"]] in ledger["stop_tokens"]
    kinds = ledger["tokens_by_kind"]
    assert (kinds["end"], sum(kinds.values())) == (40, ledger["tokens_trained"])


def test_the_terminal_shows_ledger_and_rows(nybble: Callable[..., Any], words: tuple[object, ...]) -> None:
    done = nybble(*words, "--show", "2", "--find", "three?")
    assert done.code == 0, done.err
    assert re.search(r"rows read +40\n", done.out)
    assert done.out.count("[INST] What is three? [/INST][[ It is four. </s>]]") == 2
    assert re.search(r"\nrow 3.*: \d+ of \d+ tokens learned, 1 end token\n", done.out)


def test_a_terminal_gets_colours_and_no_steering(
    nybble: Callable[..., Any], words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "steer.jsonl").write_text(json.dumps({"prompt": "a\x1b[2J[red]", "completion": "b\u202ec"}) + "\n")
    done = nybble(*words[:3], "--dataset_name", tmp_path / "steer.jsonl")
    assert done.code == 0, done.err
    assert "\x1b[2J" not in done.out
    assert "[red]" in done.out
    assert "\u202e" not in done.out
    assert re.search(r"\x1b\[[0-9;]*32m", done.out)  # learned: green
    assert re.search(r"\x1b\[[0-9;]*2m", done.out)  # masked: dim
    assert "[[" not in done.out


def test_many_rows_are_tokenized_in_sight_and_once(
    nybble: Callable[..., Any], words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    Path(str(words[4])).write_text("".join(json.dumps({"text": f"a {n}"}) + "\n" for n in range(600)))
    first = nybble(*words, "--json")
    assert [line.strip().partition("  ")[0] for line in first.err.splitlines() if "tokenizing" in line] == [
        "tokenizing 250/600", "tokenizing 500/600", "tokenizing 600/600"
    ]  # fmt: skip
    second = nybble(*words, "--json")
    assert "loaded from the cache" in second.err
    assert "tokenizing" not in second.err
    assert "tokenizing 600/600" in nybble(*words, "--json", "--no-cache").err
    assert first.out == second.out


def test_rows_are_no_longer_than_the_models_context(
    nybble: Callable[..., Any], words: tuple[object, ...], tiny_llama: Callable[..., Path]
) -> None:
    Path(str(words[4])).write_text(json.dumps({"text": "[INST] a [/INST] " + "a " * 400}) + "\n")
    done = nybble("data", "--model", tiny_llama(), *words[3:], "--max_length", "9999", "--json", "--allow_no_stop")
    assert done.code == 0, done.err
    assert "max_length 9999 is above the model's context: 256 is used" in done.err
    assert (done.json["ledger"]["rows_truncated"], done.json["ledger"]["tokens_total"]) == (1, 256)


def test_a_recipe_file_is_taken(nybble: Callable[..., Any], words: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {words[2]}\ndataset: {words[4]}\n")
    assert nybble("data", tmp_path / "recipe.yaml", "--json", "--show", 0).json["rows"] == []


class Shown(HTMLParser):
    """The text of spans by their class, and every tag and attribute that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self.text: dict[str, str] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.kind = (dict(attributes).get("class") or "masked").strip() if tag == "span" else ""
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.loads += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self.kind = ""

    def handle_data(self, data: str) -> None:
        if self.kind:
            self.text[self.kind] = self.text.get(self.kind, "") + data


def test_the_page_escapes_what_rows_say(nybble: Callable[..., Any], tokenizer_only: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=http://a.example/x>"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": hostile, "completion": "a<b>"}) + "\n")
    page = tmp_path / "page.html"
    done = nybble("data", "--model", tokenizer_only, "--dataset_name", rows, "--html", page, "--json")
    assert done.code == 0, done.err
    shown = Shown()
    shown.feed(page.read_text(encoding="utf-8"))
    assert shown.loads == []
    assert hostile in shown.text["masked"].replace(" ", "").replace("imgsrc", "img src")
    assert shown.text["learned"].endswith("a<b>")
    assert "</s>" in shown.text["learned control"]


def test_rows_that_train_would_refuse_are_shown_first(nybble: Callable[..., Any], words: tuple[object, ...]) -> None:
    done = nybble(*words, "--max_length", "8", "--json", "--show", "1")
    assert done.code == 2
    assert done.json["ledger"]["tokens_trained"] == 0
    assert done.json["rows"][0]["use"] == "dropped"


def test_the_library_gives_the_same(words: tuple[object, ...]) -> None:
    settings = {"model_name_or_path": str(words[2]), "dataset_name": str(words[4])}
    found = library.inspect_rows(None, settings, show=1)
    assert found.fault is None
    assert found.ledger.rows_read == 40
    assert "".join(part.text for part in found.rows[0].parts).replace(" ", "").endswith("Itistwo.</s>")


def test_train_says_what_became_of_long_rows(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    exchange = "<s>[INST] What is two plus two? [/INST] Two plus two is four. </s>"
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": exchange * 3}) + "\n") * 4)
    words = ("--model_name_or_path", tiny_llama(), "--dataset_name", tmp_path / "long.jsonl", "--eval_fraction", 0)
    more = ("--max_length", 64, "--overlong", "split", "--max_steps", 1, "--output_dir", tmp_path / "run")
    done = nybble("train", *words, *more)
    assert done.code == 0, done.err
    assert "4 rows are longer than max_length, 4 were split" in done.err
    ledger = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]["ledger"]
    assert (ledger["rows_split"], ledger["turns"], ledger["stop_tokens_cut"]) == (4, 12, 0)
    assert "| rows split | 4 |" in (tmp_path / "run" / "report.md").read_text()


def test_what_is_left_out_is_said_before_the_first_step(
    nybble: Callable[..., Any], words: tuple[object, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"prompt": f"{n} ", "completion": "x", "source": "web"} for n in range(6)]
    rows[3] = {"prompt": 3, "completion": "x"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.txt").write_text("not a row")
    told = (*words[:3], "--dataset_name", folder, "--on_bad_row", "skip", "--eval_fraction", 0)
    done = nybble(*told)
    assert done.code == 0, done.err
    assert re.search(r"not used: source +5 rows\n", done.out)
    assert re.search(r"file not read +notes.txt\n", done.out)
    assert re.search(r"rows skipped +1\nskipped: \S+rows.jsonl row 4: column 'prompt' is of type int", done.out)
    ledger = nybble(*told, "--json").json["ledger"]
    assert (ledger["rows_skipped"], ledger["not_used"]) == (1, {"source": 5})
    assert nybble(*told, "--on_bad_row", "stop").code == 2


def test_train_mixes_sets_and_counts_each(
    nybble: Callable[..., Any], tiny_llama: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(9)))
    sets = json.dumps([{"path": str(rows_file)}, {"path": str(more), "weight": 2}])
    words = ("train", "--model_name_or_path", tiny_llama(), "--dataset_name", sets, "--chat_template", "inst")
    done = nybble(*words, "--max_steps", 2, "--eval_fraction", 0, "--output_dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert f"{more}: 18 rows to train" in done.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["rows"]["ledger"]["sets"][str(more)]["rows_used"] == 18
    assert record["recipe"]["data"]["dataset_name"][1]["weight"] == 2
    assert f"| {more} | 18 rows to train," in (tmp_path / "run" / "report.md").read_text()
    resumed = nybble(*words, "--max_steps", 3, "--eval_fraction", 0, "--output_dir", tmp_path / "run", "--resume")
    assert "more.jsonl" in resumed.err + resumed.out
