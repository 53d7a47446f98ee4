"""Read rows from parquet, json, jsonl, csv or text files, from folders of them, or from a hub id.

The rows are never all in memory: `read_rows` iterates over them once to check, count and hash them, and callers iterate
again. Only a `.json` file with one list is held in memory as a whole, as text. JSON and CSV are parsed here rather than
by `datasets`, so that an error names the file and the line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from nybble.errors import CannotRunError, RowsError
from nybble.guard import as_path, brief, library_faults

Row = dict[str, Any]
Placed = tuple[str, Row]  # the row's place as messages name it ("FILE row 3"), and the row

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")

MOST_ROW_CHARACTERS = 16 << 20  # limit for one row as JSON or CSV; parsing it takes up to 25 times as much memory
# Split -> words in the names of its files; files without any of these words belong to "train".
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Rows:
    """Rows that were checked once and can be iterated any number of times; iteration yields `Placed` rows."""

    source: str
    first: Row
    fingerprint: str  # SHA-256 of the content of all rows in order, independent of the file format
    n_bytes: int  # size of all rows as JSON
    n_rows: int
    read: Callable[[], Iterator[Placed]]

    def __iter__(self) -> Iterator[Placed]:
        return self.read()

    def __len__(self) -> int:
        return self.n_rows


def read_rows(name: str, split: str = "train", limit: int | None = None, config: str | None = None) -> Rows:
    """Read and check the rows of one split.

    Args:
        name: a file, a folder of files, or a hub id.
        split: the split to read; a single file is one split, whatever its name.
        limit: read at most this many rows.
        config: the configuration of the hub's data set, if it has several.

    Raises:
        RowsError: the rows are missing, empty or malformed, or a folder has no such split.
        CannotRunError: the rows cannot be fetched from the hub.
    """
    if not name:
        raise RowsError("no rows given; set --dataset_name to a parquet, json, jsonl, csv or text file, or a hub id")
    path = as_path(name, RowsError)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _files_of(path, split)
    elif path.is_absolute() or path.suffix.lower() in _READERS or name.startswith((".", "~")) or name.count("/") > 1:
        raise RowsError(f"rows file {name!r} does not exist; give a file, a folder of files, or a hub id")
    else:
        return _examine(name, partial(_read_hub, name, _load_hub(name, split, limit, config), limit))
    return _examine(name, partial(_read_files, files, limit))


def _examine(source: str, read: Callable[[], Iterator[Placed]]) -> Rows:
    digest = hashlib.sha256()
    first: Row | None = None
    n_rows = 0
    n_bytes = 0
    for where, row in read():
        if not isinstance(row, dict):
            raise RowsError(
                f"{where}: is of type {type(row).__name__}, but a row must be an object with columns; repair the file"
            )
        for value in row.values():
            if isinstance(value, str):
                check_text(value, where)
        content = _content(row, where)
        digest.update(content)
        digest.update(b"\n")
        first = row if first is None else first
        n_rows += 1
        n_bytes += len(content)
    if first is None:
        raise RowsError(f"{source} contains no rows; give a file that contains rows")
    return Rows(source, first, digest.hexdigest(), n_bytes, n_rows, read)


def _content(row: Row, where: str) -> bytes:
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode()
    # The row is nested too deeply, or holds a number that is too long, keys that cannot be sorted, or invalid text.
    except (RecursionError, ValueError, TypeError) as error:
        raise RowsError(f"{where}: cannot be read as a row ({brief(error)}); a row has columns with text") from error


def check_text(text: str, where: str) -> None:
    """Check that `text` has no unpaired surrogate, which JSON permits and no tokenizer accepts.

    Raises:
        RowsError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowsError(f"{where}: character {error.start} is an unpaired surrogate; repair the text") from error


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files below `folder` that belong to `split`, according to the words in their paths."""
    wanted = next((name for name, words in _SPLITS.items() if split in words), split)
    files_by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.suffix.lower() in _READERS and not any(part.startswith(".") for part in inner.parts):
            words = set(re.split(r"[^a-z0-9]+", str(inner.with_suffix("")).lower()))
            named = (name for name, split_words in _SPLITS.items() if not words.isdisjoint(split_words))
            files_by_split.setdefault(next(named, "train"), []).append(file)
    if not files_by_split:
        raise RowsError(f"{folder} contains no files with rows; allowed extensions: {', '.join(_READERS)}")
    if wanted not in files_by_split:
        splits = ", ".join(files_by_split)
        raise RowsError(f"{folder} has no split {split!r}; according to its file names it has: {splits}")
    return files_by_split[wanted]


def _read_files(files: list[Path], limit: int | None) -> Iterator[Placed]:
    return islice((placed for file in files for placed in _read_file(file)), limit)


def _read_file(path: Path) -> Iterator[Placed]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RowsError(f"{path}: extension {path.suffix!r} is not supported; allowed: {', '.join(_READERS)}")
    try:
        for number, row in enumerate(reader(path), start=1):
            yield f"{path} row {number}", row
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror or error}); give a readable file") from error
    except UnicodeDecodeError as error:
        line, byte = _undecodable(path)
        raise RowsError(f"{path} line {line}: byte {byte} is not UTF-8; convert the file to UTF-8") from error


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


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    advice = "give a complete parquet file"
    with library_faults(f"{path}: is not a parquet file", RowsError, advice):
        file = parquet.ParquetFile(path, memory_map=True)
    with file:
        batches = file.iter_batches(batch_size=1024)
        while True:
            with library_faults(f"{path} is damaged", RowsError, advice):
                batch = next(batches, None)
                rows = batch.to_pylist() if batch is not None else []
            if batch is None:
                return
            yield from rows


def _read_json(path: Path) -> Iterator[Row]:
    """Read a file that holds a list of rows, one row, or one row per line."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        opening = next((line.strip() for line in _lines(stream, path) if line.strip()), "")
    if not opening.startswith("[") and not _is_one_row(opening):
        yield from _read_jsonl(path)
        return
    yield from _members(path.read_text(encoding="utf-8-sig"), path)


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
        raise RowsError(f"{path}: contains JSON that cannot be read ({brief(error)}); repair the file") from error


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


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: JSON allows the other separators inside strings.
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowsError(
                        f"{path} line {number}: is not valid JSON ({error.msg}); repair the line"
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise RowsError(
                        f"{path} line {number}: contains JSON that cannot be read ({brief(error)}); repair the line"
                    ) from error
                yield row


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        former = csv.field_size_limit(MOST_ROW_CHARACTERS)  # the module's limit (131,072) is restored below
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise RowsError(
                        f"{path} line {reader.line_num}: has different columns from the first line; "
                        "quote values that contain commas"
                    )
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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_text,
}


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise RowsError(f"{name}: {reason}; set --dataset_config or --dataset_split") from error
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise CannotRunError(
            f"{name!r} is not a local file and cannot be fetched from the hub; give a local file, or go online"
        ) from error


def _load_hub(name: str, split: str, limit: int | None, config: str | None) -> Any:
    """Load a data set from the hub, on disk in Arrow format; with a limit, as a stream that fetches only those rows."""
    from datasets import load_dataset

    with _fetching(name):
        return load_dataset(name, config, split=split, streaming=limit is not None)


def _read_hub(name: str, rows: Any, limit: int | None) -> Iterator[Placed]:
    with _fetching(name):
        for number, row in enumerate(islice(rows, limit), start=1):
            yield f"{name} row {number}", row
