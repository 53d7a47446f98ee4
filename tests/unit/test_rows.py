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
    (tmp_path / "c.txt").write_text("3")
    assert [row["text"] for row in rows_in(str(tmp_path))] == ["1", "2", "3"]


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
