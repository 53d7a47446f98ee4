"""Reading rows: each ending gives the same rows, and each damage is named with file and line or row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.data import read_rows
from nybble.errors import CannotRunError, RowsError

ROWS = [{"prompt": "Wie geht’s? 😀", "completion": "שלום, gut"}, {"prompt": "a\r\nb\tc", "completion": ""}]
SEPARATORS = "a\u2028b\u2029c\x85d"  # str.splitlines() would cut at each of these


def write_parquet(file: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_json(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    import csv

    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


WRITERS: list[tuple[str, Callable[[Path, list[dict[str, str]]], None]]] = [
    ("rows.parquet", write_parquet),
    ("rows.json", write_json),
    ("lines.json", write_lines),
    ("rows.jsonl", write_lines),
    ("ROWS.JSONL", write_lines),
    ("rows.csv", write_csv),
]
EACH_WRITER = pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])


def rows_in(name: str, **options: Any) -> list[dict[str, Any]]:
    return [row for _where, row in read_rows(name, **options)]


def refusal(file: Path | str, content: bytes | str | None = None) -> str:
    """The message for a file with this content; it is one line that starts with the file's name."""
    if content is not None:
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RowsError) as caught:
        read_rows(str(file))
    message = str(caught.value)
    assert "\n" not in message
    if content is not None:
        assert message.startswith(str(file))
    return message.removeprefix(str(file))


@EACH_WRITER
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    write(tmp_path / name, ROWS)
    found = read_rows(str(tmp_path / name))
    assert list(found) == [(f"{tmp_path / name} row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert list(found) == list(found)
    assert (found.source, found.first, len(found)) == (str(tmp_path / name), ROWS[0], 2)


def fingerprint(folder: Path, rows: list[dict[str, str]], name: str = "x.jsonl", write: Any = write_lines) -> str:
    write(folder / name, rows)
    return read_rows(str(folder / name)).fingerprint


@EACH_WRITER
def test_the_fingerprint_is_of_the_rows_not_of_the_format(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    assert fingerprint(tmp_path, ROWS, name, write) == fingerprint(tmp_path, ROWS)


@pytest.mark.parametrize(
    "changed",
    [
        [{**ROWS[0], "completion": "שלום, gut."}, ROWS[1]],
        [{**ROWS[0], "more": ""}, ROWS[1]],
        [ROWS[1], ROWS[0]],
        ROWS[:1],
        [*ROWS, ROWS[1]],
    ],
    ids=["text", "column", "order", "fewer", "more"],
)
def test_the_fingerprint_changes_with_any_row(tmp_path: Path, changed: list[dict[str, str]]) -> None:
    assert fingerprint(tmp_path, changed) != fingerprint(tmp_path, ROWS)


def test_the_fingerprint_ignores_the_order_of_columns(tmp_path: Path) -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    assert fingerprint(tmp_path, turned) == fingerprint(tmp_path, ROWS)


def test_text_files_give_a_row_per_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes("one\r\nstill one\r\n\r\n\r\ntwo 😀\n\n\n".encode())
    assert rows_in(str(file)) == [{"text": "one\nstill one"}, {"text": "two 😀"}]


def test_a_folder_gives_the_rows_of_its_files_in_order_of_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "2"}])
    write_parquet(tmp_path / "a.parquet", [{"text": "1"}])
    (tmp_path / "README.md").write_text("not rows")
    assert [row["text"] for row in rows_in(str(tmp_path))] == ["1", "2"]


def test_text_and_metadata_beside_rows_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "b.jsonl", [{"text": "2"}])
    (tmp_path / "data" / "ideas.txt").write_text("buy milk")
    (tmp_path / "LICENSE.txt").write_text("do what you want")
    (tmp_path / "more.jsonl.gz").write_bytes(b"x")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": "x"}}')
    found = read_rows(str(tmp_path))
    assert [row for _, row in found] == [{"text": "2"}]
    assert found.files_not_read == ("LICENSE.txt", "data/ideas.txt", "dataset_infos.json", "more.jsonl.gz")


def test_a_folder_of_text_gives_its_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("b.txt", "two\n\nthree"), ("requirements.txt", "torch")):
        (tmp_path / name).write_text(text)
    found = read_rows(str(tmp_path))
    assert [row for _, row in found] == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert found.files_not_read == ("requirements.txt",)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(train=rows, test=rows)`: the folder that `save_to_disk` writes; `saved(rows)` is a single data set."""
    from datasets import Dataset, DatasetDict

    def save(rows: list[dict[str, Any]] | None = None, **splits: list[dict[str, Any]]) -> Path:
        made = Dataset.from_list(rows) if rows else DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()})
        made.save_to_disk(tmp_path / "saved", **({"num_shards": min(3, len(rows))} if rows else {}))
        return tmp_path / "saved"

    return save


def test_what_save_to_disk_wrote_is_read_in_order(saved: Callable[..., Path]) -> None:
    rows = [{"text": str(number)} for number in range(7)]
    folder = saved(rows)
    assert rows_in(str(folder)) == rows
    assert rows_in(str(folder), limit=2) == rows[:2]
    with pytest.raises(RowsError, match="has no split 'test'; it was saved as one data set"):
        read_rows(str(folder), "test")


def test_the_splits_of_save_to_disk_are_read(saved: Callable[..., Path]) -> None:
    folder = saved(train=[{"text": "a"}], dev=[{"text": "b"}], long=[{"text": "c"}])
    found = {name: rows_in(str(folder), split=name) for name in ("train", "validation", "dev", "long")}
    assert found == {
        "train": [{"text": "a"}],
        "validation": [{"text": "b"}],
        "dev": [{"text": "b"}],
        "long": [{"text": "c"}],
    }
    with pytest.raises(RowsError, match="has no split 'test'; it has: train, dev, long"):
        read_rows(str(folder), "test")


@pytest.mark.parametrize("state", ["{}", "[", '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": [3]}'])
def test_a_damaged_folder_of_save_to_disk_is_refused(saved: Callable[..., Path], state: str) -> None:
    folder = saved([{"text": "a"}])
    (folder / "state.json").write_text(state)
    (folder.parent / "x.arrow").write_bytes(next(folder.glob("*.arrow")).read_bytes())
    assert refusal(folder)


NESTED: list[dict[str, Any]] = [
    {"calls": [{"name": "move", "arguments": {"x": 1, "y": [None, 2]}}], "kind": "a"},
    {"calls": [{"name": "paint", "arguments": {"colour": "red"}}, {"name": "stop", "arguments": {}}], "kind": None},
    {"calls": [], "kind": "b"},
    {"calls": [{"name": "ask", "arguments": {"deep": {"one": {"q": "?"}}}, "default": None}], "kind": "c"},
    {"calls": [{"name": "ask", "arguments": {"deep": {"two": [{"r": 1}, {"s": 2}]}}, "default": None}], "kind": "d"},
]


def write_arrow_file(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_stream(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("write", [write_parquet, write_arrow_file, write_arrow_stream])
def test_keys_that_arrow_added_are_gone(tmp_path: Path, write: Callable[[Path, Any], None]) -> None:
    rows = [{**row, "calls": [{k: v for k, v in c.items() if k != "default"} for c in row["calls"]]} for row in NESTED]
    write(tmp_path / "r.parquet", rows)
    assert rows_in(str(tmp_path / "r.parquet")) == rows


def test_nulls_that_somebody_wrote_stay(tmp_path: Path) -> None:
    rows = [{"calls": [{"default": None, "enum": ["a", None]}], "more": None, "only": "x"}]
    write_parquet(tmp_path / "r.parquet", rows)
    write_lines(tmp_path / "r.jsonl", NESTED)
    assert rows_in(str(tmp_path / "r.parquet")) == rows
    assert rows_in(str(tmp_path / "r.jsonl")) == NESTED


def test_rows_of_datasets_lose_the_keys_that_arrow_added(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"m": [{"a": 1}]}, {"m": [{"b": "x"}]}]
    for made in (datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_args, made=made, **_options: made)
        assert rows_in("some/rows") == rows
        assert rows_in("some/rows", limit=1) == rows[:1]


@pytest.mark.parametrize("write", [write_lines, write_json, write_parquet, write_arrow_stream])
@pytest.mark.parametrize("name", ["r.txt", "r.csv", "r.json", "r.jsonl", "r.parquet", "r.ndjson", "rows"])
def test_the_content_tells_what_a_file_is(tmp_path: Path, name: str, write: Callable[[Path, Any], None]) -> None:
    write(tmp_path / name, ROWS)
    assert rows_in(str(tmp_path / name)) == ROWS


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_a_list_on_one_line_is_read_by_any_name(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    for name in ("r.txt", "r.jsonl", "r.json"):
        (tmp_path / name).write_text(json.dumps(rows))
        assert rows_in(str(tmp_path / name)) == rows


@pytest.mark.parametrize(
    "text",
    [
        "[INST] Q [/INST] A",
        "{{ bos_token }}\nx",
        "[1] A footnote",
        '["a", "b"]',
        "[\nan open bracket",
        "{\n  x = 1;\n}",
    ],
)
def test_text_that_begins_with_a_bracket_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.txt").write_text(text)
    assert rows_in(str(tmp_path / "r.txt")) == [{"text": text}]


@pytest.mark.parametrize(("name", "mark"), [("r.csv", ";"), ("r.csv", "\t"), ("r.tsv", "\t"), ("r.csv", ",")])
def test_columns_may_be_separated_in_other_ways(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f'prompt{mark}completion\nWhy?{mark}"a{mark}b"\n')
    assert rows_in(str(tmp_path / name)) == [{"prompt": "Why?", "completion": f"a{mark}b"}]


def test_rows_that_cannot_be_read_are_yielded_as_errors(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"text"\n{"text": "a"}\n[1]\n{"text": "\\ud83d"}\n{"text": "b"}\n')
    found = list(read_rows(str(file), on_bad_row="skip"))
    assert [row for _, row in found if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]
    faults = [str(row) for _, row in found if not isinstance(row, dict)]
    assert [fault.removeprefix(str(file)).split(":")[0] for fault in faults] == [" line 1", " row 3", " row 4"]
    file.write_text("{x\nx\n")
    with pytest.raises(RowsError, match="none of its 2 rows can be read, the first because"):
        read_rows(str(file), on_bad_row="skip")


def test_a_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "r.jsonl", ROWS)
    assert rows_in(str(tmp_path / "r.jsonl"), limit=1) == ROWS[:1]
    assert rows_in(str(tmp_path / "r.jsonl"), limit=9) == ROWS


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_strings_may_hold_unicode_line_separators(tmp_path: Path, name: str) -> None:
    content = json.dumps({"text": SEPARATORS}, ensure_ascii=False) + '\r\n\n{"text": "next"}'
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [row["text"] for row in rows_in(str(tmp_path / name))] == [SEPARATORS, "next"]


def test_csv_cells_may_hold_line_breaks_and_separators(tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", [{"text": f'"{SEPARATORS}",\n\r\n\x0b\x0c\x1cx'}])
    assert rows_in(str(tmp_path / "r.csv")) == [{"text": f'"{SEPARATORS}",\n\r\n\x0b\x0c\x1cx'}]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, name: str) -> None:
    content = "text\nx\n" if name.endswith("csv") else '{"text": "x"}\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert rows_in(str(tmp_path / name)) == [{"text": "x"}]


@pytest.mark.parametrize("name", ["/no/such/rows", "no_such.jsonl", "./no_such", "~/no_such_rows", "a/b/c", "N.CSV"])
def test_a_missing_file_is_named(name: str) -> None:
    assert refusal(name) == f"rows file {name!r} does not exist; give a file, a folder of files, or a hub id"


def test_no_name_is_told_what_to_give() -> None:
    assert "--dataset_name" in refusal("")


def test_a_hub_id_without_network_cannot_run() -> None:
    with pytest.raises(CannotRunError, match="'nobody/no-rows' is not a local file"):
        read_rows("nobody/no-rows")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", ""),
        ("r.jsonl", " \n\n"),
        ("r.json", ""),
        ("r.json", "[]"),
        ("r.csv", ""),
        ("r.csv", "text\n"),
        ("r.txt", "\n\n \n"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    assert refusal(tmp_path / name, content) == " contains no rows; give a file that contains rows"


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "r.parquet")
    assert "contains no rows" in refusal(tmp_path / "r.parquet")


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert "contains no files with rows; allowed extensions: .parquet, .json" in refusal(tmp_path)


def test_an_unknown_ending_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "r.docx", "x").startswith(
        ": extension '.docx' is not supported; allowed: .parquet, .json, .jsonl"
    )


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("r.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n', 2),
        ("r.jsonl", '{"text": "a"}\n\n\nwords\n', 4),
        ("r.jsonl", '{"text": "a\u2028b"}\n{"text": "b"} x\n', 2),
        ("r.json", '{"text": "a"}\n{"text": "b"}\n{text}\n', 3),
        ("r.json", '[\n {"text": "a"},\n {"text": b}\n]', 3),
    ],
)
def test_what_is_not_json_is_named_by_line(tmp_path: Path, name: str, content: str, line: int) -> None:
    assert refusal(tmp_path / name, content).startswith(f" line {line}: is not valid JSON (")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("r.jsonl", '{"text": "a"}\n["b"]\n', "list"),
        ("r.json", '[{"text": "a"}, "b"]', "str"),
        ("r.json", '{"text": "a"}\n3\n', "int"),
        ("r.jsonl", '{"text": "a"}\nnull\n', "NoneType"),
    ],
)
def test_a_row_that_is_no_object_is_named_by_number(tmp_path: Path, name: str, content: str, kind: str) -> None:
    assert refusal(tmp_path / name, content) == (
        f" row 2: is of type {kind}, but a row must be an object with columns; repair the file"
    )


@pytest.mark.parametrize("row", ["1,2,3", "1"])
def test_a_ragged_csv_row_is_named_by_line(tmp_path: Path, row: str) -> None:
    message = refusal(tmp_path / "r.csv", f"a,b\n1,2\n{row}\n3,4\n")
    assert message == " line 3: has different columns from the first line; quote values that contain commas"


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.txt"])
def test_what_is_not_utf8_is_named_by_byte(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name, b'{"text": "\xfc"}') == " line 1: byte 10 is not UTF-8; convert the file to UTF-8"


@pytest.mark.parametrize("keep", [0, 8, 30, -1, -9])
def test_a_cut_parquet_file_is_refused(tmp_path: Path, keep: int) -> None:
    write_parquet(tmp_path / "whole.parquet", ROWS)
    content = (tmp_path / "whole.parquet").read_bytes()[:keep]
    assert refusal(tmp_path / "cut.parquet", content).startswith(": is not a parquet file (")


def test_a_damaged_file_in_a_folder_is_the_one_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nx\n')
    assert refusal(tmp_path) == "/b.jsonl line 2: is not valid JSON (Expecting value); repair the line"


def test_a_byte_order_mark_is_no_part_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_bytes(b"\xef\xbb\xbfx")
    assert rows_in(str(tmp_path / "r.txt")) == [{"text": "x"}]


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\n" + "x" * 140_000)
    assert len(rows_in(str(tmp_path / "r.csv"))[0]["text"]) == 140_000


@pytest.mark.parametrize(
    ("name", "content"), [("r.csv", b"text\n" + b"ok\n" * 40_000), ("r.jsonl", b'\xef\xbb\xbf{"text": "')]
)
def test_the_byte_that_is_not_utf8_is_counted_from_the_start(tmp_path: Path, name: str, content: bytes) -> None:
    line = content.count(b"\n") + 1
    assert refusal(tmp_path / name, content + b"\xff").startswith(f" line {line}: byte {len(content)} is")


@pytest.mark.parametrize("content", ['{"a": ' + "1" * 5000 + "}", "[" * 100_000], ids=["digits", "depth"])
def test_json_beyond_pythons_limits_is_refused(tmp_path: Path, content: str) -> None:
    assert " line 1: " in refusal(tmp_path / "r.jsonl", content)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    assert "row 1" in refusal(tmp_path / "r.jsonl", '{"text": "\\ud83d"}')
