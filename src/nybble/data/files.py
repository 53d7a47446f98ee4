"""Read the rows of one file: parquet, arrow, JSON, JSON lines, CSV or text.

The file's content decides what it is; its extension only decides where the content leaves it open. JSON and CSV are
parsed here rather than by `datasets`, so that an error names the file and the line. Only a JSON file with one list is
held in memory as a whole, as text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from nybble.errors import RowsError
from nybble.guard import brief, library_faults

Row = dict[str, Any]
# What a reader yields for each row: the row, any other JSON value, or why this one row cannot be read.
Found = Any

MOST_ROW_CHARACTERS = 16 << 20  # limit for one row as JSON or CSV; parsing it takes up to 25 times as much memory
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_SNIFFED_BYTES = 4096
Kind = Literal["parquet", "arrow", "json", "csv", "text"]
EXTENSIONS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
    ".tsv": "csv",
}


def read_file(path: Path) -> Iterator[tuple[str, Found]]:
    """Yield each row of the file with its place, as messages name it ("FILE row 3").

    Raises:
        RowsError: the file cannot be read from here on.
    """
    try:
        kind = _kind_of(path)
        if kind is None:
            raise RowsError(
                f"{path}: extension {path.suffix!r} is not supported; allowed: {', '.join(EXTENSIONS)}, or any other "
                "name for a parquet, arrow or JSON file"
            )
        for number, row in enumerate(_READERS[kind](path), start=1):
            yield f"{path} row {number}", row
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror or error}); give a readable file") from error
    except UnicodeDecodeError as error:
        line, byte = _undecodable(path)
        raise RowsError(f"{path} line {line}: byte {byte} is not UTF-8; convert the file to UTF-8") from error


def _kind_of(path: Path) -> Kind | None:
    """What the file is by its content or, where that leaves it open, by its extension; None if both are unknown."""
    with path.open("rb") as stream:
        begin = stream.read(_SNIFFED_BYTES)
    if begin.startswith(b"PAR1"):
        return "parquet"
    if begin.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    kind = EXTENSIONS.get(path.suffix.lower())
    if kind != "json" and _is_json(path, begin):
        return "json"
    return kind


def _is_json(path: Path, begin: bytes) -> bool:
    """Whether the text is JSON: an object or a list of objects in its first line, or in its first lines together."""
    if not begin.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return False
    try:
        opening = next(_openings(path), "")
        if not _is_one_row(opening) and not opening.endswith(("[", "{")):
            value = json.loads(opening)
            return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(v, dict) for v in value))
        # A list or an object over several lines; `[1] A footnote` and `{{ a template }}` are text.
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.read(_SNIFFED_BYTES)
        inner = text.lstrip()[1:].lstrip()
        return inner.startswith(("{", "}") if opening.startswith("[") else ('"', "}"))
    except (ValueError, RecursionError, RowsError):  # bytes that are not UTF-8 are named where the file is read
        return False


def _undecodable(path: Path) -> tuple[int, int]:
    """The line, and the offset in bytes, where the file stops being UTF-8.

    A decoder reports its offset within the chunk that it was given, not within the file.
    """
    line = 0
    before = 0
    with path.open("rb") as stream:
        for line, content in enumerate(stream, start=1):
            try:
                content.decode()
            except UnicodeDecodeError as error:
                return line, before + error.start
            before += len(content)
    return line, before


def _read_parquet(path: Path) -> Iterator[Found]:
    from pyarrow import parquet

    advice = "give a complete parquet file"
    with library_faults(f"{path}: is not a parquet file", RowsError, advice):
        file = parquet.ParquetFile(path, memory_map=True)
    with file:
        yield from _rows_of_batches(file.iter_batches(batch_size=1024), f"{path} is damaged", advice)


def _read_arrow(path: Path) -> Iterator[Found]:
    """Read what `datasets` writes (a stream of record batches), or an Arrow file."""
    import pyarrow as pa

    advice = "give a complete arrow file"
    with library_faults(f"{path}: is not an arrow file", RowsError, advice), pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        yield from _rows_of_batches(batches, f"{path} is damaged", advice)


def _rows_of_batches(batches: Iterator[Any], fault: str, advice: str) -> Iterator[Row]:
    while True:
        with library_faults(fault, RowsError, advice):
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # offsets of a damaged file may lie outside of it
            rows = rows_of_batch(batch) if batch is not None else []
        if batch is None:
            return
        yield from rows


def rows_of_batch(batch: Any) -> list[Row]:
    """The rows of a record batch, without the keys that Arrow added.

    All structs of an Arrow column have the same keys, so where one object has a key, every other gets it as null. Such
    keys are removed again, at any depth. Null columns, null members of lists and keys that are null in every object,
    as `"default": null` may be, were written by someone and stay.
    """
    rows: list[Row] = batch.to_pylist()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _has_null_keys(column):
            for row in rows:
                row[name] = _without_null_keys(row[name], column.type)
    return rows


def _has_null_keys(column: Any) -> bool:
    """Whether any struct inside the column has a null under a key."""
    import pyarrow as pa

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _has_null_keys(column.values)
    if pa.types.is_struct(column.type):
        return any(
            field.null_count > 0 or _has_null_keys(field) for field in map(column.field, range(len(column.type)))
        )
    return False


def _without_null_keys(value: Any, kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {
            field.name: _without_null_keys(value[field.name], field.type)
            for field in kind
            if value[field.name] is not None or pa.types.is_null(field.type)
        }
    if isinstance(value, list) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return [_without_null_keys(member, kind.value_type) for member in value]
    return value


def _read_json(path: Path) -> Iterator[Found]:
    """Read a file that holds a list of rows, one row, or one row per line."""
    opening = next(_openings(path), "")
    if not opening.startswith("[") and not _is_one_row(opening):
        yield from _read_lines(path)
        return
    yield from _members(path.read_text(encoding="utf-8-sig"), path)


def _openings(path: Path) -> Iterator[str]:
    """Yield the lines that are not blank, without surrounding white space."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        yield from (line.strip() for line in _lines(stream, path) if line.strip())


def _members(text: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a list, or the one row, parsed one at a time: parsed JSON takes many times its text's size."""
    at = _skip_space(text, 0)
    if text.startswith("[", at):
        at = _skip_space(text, at + 1)
        is_open = not text.startswith("]", at)
        while is_open:
            row, at = _parse_json(text, at, path)
            yield row
            at = _skip_space(text, at)
            is_open = text.startswith(",", at)
            at = _skip_space(text, at + 1) if is_open else at
        is_whole = text.startswith("]", at)
        at += 1
    else:
        row, at = _parse_json(text, at, path)
        is_whole = True
        yield row
    if not is_whole or _skip_space(text, at) < len(text):
        line = text.count("\n", 0, at) + 1
        raise RowsError(f"{path} line {line}: is not valid JSON (expected ',' or the end); repair the file")


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _parse_json(text: str, start: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise RowsError(f"{path} line {error.lineno}: is not valid JSON ({error.msg}); repair the file") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        line = text.count("\n", 0, start) + 1
        raise RowsError(
            f"{path} line {line}: contains JSON that cannot be read ({brief(error)}); repair the file"
        ) from error


def _is_one_row(opening: str) -> bool:
    """Whether a file's first line only begins an object, which a later line completes."""
    return opening == "{" or (opening.startswith("{") and opening.endswith((",", "[", "{", ":")))


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file and refuse a line above the limit.

    Raises:
        RowsError: a line has more than `MOST_ROW_CHARACTERS`.
    """
    number = 0
    while line := stream.readline(MOST_ROW_CHARACTERS + 1):
        number += 1
        if len(line) > MOST_ROW_CHARACTERS:
            raise RowsError(
                f"{path} line {number}: has more than {MOST_ROW_CHARACTERS:,} characters, the limit for one row; "
                "write one row per line"
            )
        yield line


def _read_lines(path: Path) -> Iterator[Found]:
    # Only "\n" ends a line: JSON allows the other separators inside strings.
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if line.strip():
                yield _parse_line(line, f"{path} line {number}")


def _parse_line(line: str, where: str) -> Found:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowsError(f"{where}: is not valid JSON ({error.msg}); repair the line")
    except (ValueError, RecursionError) as error:
        return RowsError(f"{where}: contains JSON that cannot be read ({brief(error)}); repair the line")


def _read_csv(path: Path) -> Iterator[Found]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = stream.readline(MOST_ROW_CHARACTERS)
        stream.seek(0)
        # Some programs separate columns by semicolons or tabs; a header with neither has commas or one column.
        delimiter = "," if "," in header else next((mark for mark in "\t;" if mark in header), ",")
        reader = csv.DictReader(stream, delimiter=delimiter)
        former = csv.field_size_limit(MOST_ROW_CHARACTERS)  # the module's limit (131,072) is restored below
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield RowsError(
                        f"{path} line {reader.line_num}: has different columns from the first line; "
                        "quote values that contain commas"
                    )
                else:
                    yield row
        except csv.Error as error:
            raise RowsError(f"{path} line {reader.line_num}: is not valid CSV ({error}); repair the line") from error
        finally:
            csv.field_size_limit(former)


def _read_text(path: Path) -> Iterator[Row]:
    """Yield each paragraph as a row; blank lines separate paragraphs."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        lines: list[str] = []
        for line in stream:
            if line.strip("\r\n"):
                lines.append(line.replace("\r\n", "\n"))
            elif text := "".join(lines).strip():
                yield {"text": text}
                lines = []
        if text := "".join(lines).strip():
            yield {"text": text}


_READERS: dict[Kind, Callable[[Path], Iterator[Found]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "json": _read_json,
    "csv": _read_csv,
    "text": _read_text,
}
