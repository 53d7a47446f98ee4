"""Reading rows: parquet, json, jsonl, csv or text files, folders of them, or a hub id.

JSON and CSV are read here rather than by `datasets`, so that a broken line is named by file and number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, RowsError

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows as they stand in a file, and where they came from."""

    source: str
    rows: Sequence[Row]

    def where(self, index: int) -> str:
        """How a message names row `index` (counted from 1 for people)."""
        return f"{self.source} row {index + 1}"

    def fingerprint(self) -> str:
        """SHA-256 over the content of all rows, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def read_rows(name: str, split: str = "train", limit: int | None = None) -> Rows:
    """The rows that `name` (a file, a folder of files, or a hub id) holds.

    Raises:
        RowsError: missing, empty, or not what its ending says.
        CannotRunError: a hub id that cannot be fetched.
    """
    if not name:
        raise RowsError("no rows given; set --dataset_name to a parquet, json, jsonl, csv or text file, or a hub id")
    path = Path(name).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS)
        if not files:
            raise RowsError(f"{name} holds no file of rows; endings that are read: {', '.join(_READERS)}")
        rows = [row for file in files for row in _read_file(file)]
    elif path.is_absolute() or path.suffix.lower() in _READERS or name.startswith((".", "~")) or name.count("/") > 1:
        raise RowsError(f"rows file {name!r} does not exist")
    else:
        rows = _read_hub(name, split)
    if not rows:
        raise RowsError(f"{name} holds no rows")
    return Rows(name, rows[:limit] if limit else rows)


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RowsError(f"{path}: ending {path.suffix!r} is not read; allowed: {', '.join(_READERS)}")
    rows = list(reader(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise RowsError(f"{path} row {number}: is a {type(row).__name__}, a row is an object with columns")
        for value in row.values():
            if isinstance(value, str):
                check_text(value, f"{path} row {number}")
    return rows


def check_text(text: str, where: str) -> None:
    """JSON can hold half a surrogate pair, which no tokenizer takes.

    Raises:
        RowsError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowsError(f"{where}: character {error.start} is half a surrogate pair; repair the text") from error


def _text_of(path: Path) -> str:
    """The whole file, its byte order mark left out."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RowsError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        yield from parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RowsError(f"{path}: not a parquet file ({str(error).partition(chr(10))[0]})") from error


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, one row, or a row a line."""
    text = _text_of(path)
    if not text.lstrip().startswith("[") and not _is_one_row(text):
        yield from _json_lines(path, text)
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowsError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise RowsError(f"{path}: JSON that cannot be read ({error})") from error
    yield from content if isinstance(content, list) else [content]


def _is_one_row(text: str) -> bool:
    """Whether the first line opens an object that a later one closes: it holds no more than its beginning."""
    first = text.lstrip().partition("\n")[0].strip()
    return first == "{" or (first.startswith("{") and first.endswith((",", "[", "{", ":")))


def _read_jsonl(path: Path) -> Iterator[Row]:
    yield from _json_lines(path, _text_of(path))


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): that also splits at separators which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RowsError(f"{path} line {number}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise RowsError(f"{path} line {number}: JSON that cannot be read ({error})") from error


def _read_csv(path: Path) -> Iterator[Row]:
    text = _text_of(path)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    former = csv.field_size_limit(max(len(text), 1))  # the module's limit of 131,072 is put back below
    try:
        for row in reader:
            if None in row or None in row.values():
                raise RowsError(f"{path} line {reader.line_num}: has other columns than the first line")
            yield dict(row)
    except csv.Error as error:
        raise RowsError(f"{path} line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(former)


def _read_text(path: Path) -> Iterator[Row]:
    """Paragraphs, parted by blank lines."""
    text = _text_of(path).replace("\r\n", "\n")
    yield from ({"text": part.strip()} for part in text.split("\n\n") if part.strip())


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_text,
}


def _read_hub(name: str, split: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return list(load_dataset(name, split=split))
    except ValueError as error:
        raise RowsError(f"{name}: {str(error).partition(chr(10))[0]}") from error
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise CannotRunError(
            f"{name!r} is no file here and cannot be fetched from the hub; give a local file, or connect"
        ) from error
