"""Reading rows: parquet, json, jsonl, csv or text files, folders of them, or a hub id.

Rows are never all in memory: reading goes through them once to check, count and hash them, and whoever needs them goes
through them again. Of the endings only `.json` with one list is held whole, as text. JSON and CSV are read
here rather than by `datasets`, so that a broken line is named by file and number.
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
Placed = tuple[str, Row]  # how a message names the row, and the row

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")

MOST_ROW_CHARACTERS = 16 << 20  # of a row as JSON or CSV; parsed, it takes up to 25 times as much
# Split -> words in the names of its files; files without such a word belong to the first.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Rows:
    """Rows that were gone through once and can be gone through again; iteration yields `Placed` ones."""

    source: str
    first: Row
    fingerprint: str  # SHA-256 over the content of all rows, in order, whatever kind of file they are in
    n_bytes: int  # of all rows as JSON
    n_rows: int
    read: Callable[[], Iterator[Placed]]

    def __iter__(self) -> Iterator[Placed]:
        return self.read()

    def __len__(self) -> int:
        return self.n_rows


def read_rows(name: str, split: str = "train", limit: int | None = None, config: str | None = None) -> Rows:
    """The rows of `split` that `name` (a file, a folder of files, or a hub id) holds, or the first `limit` of them.

    `config` names one of the sets that a hub id holds.

    Raises:
        RowsError: missing, empty, or not what its ending says; a folder without that split.
        CannotRunError: a hub id that cannot be fetched.
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
    n_rows = n_bytes = 0
    for where, row in read():
        if not isinstance(row, dict):
            raise RowsError(
                f"{where}: is of type {type(row).__name__}; a row is an object with columns: repair the file"
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
        raise RowsError(f"{source} holds no rows; give a file that does")
    return Rows(source, first, digest.hexdigest(), n_bytes, n_rows, read)


def _content(row: Row, where: str) -> bytes:
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode()
    # Nested too deep, a number too long to be written, keys that have no order, a text that is none.
    except (RecursionError, ValueError, TypeError) as error:
        raise RowsError(f"{where}: holds what is no row ({brief(error)}); a row is columns with text") from error


def check_text(text: str, where: str) -> None:
    """JSON can hold half a surrogate pair, which no tokenizer takes.

    Raises:
        RowsError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowsError(f"{where}: character {error.start} is half a surrogate pair; repair the text") from error


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files in a folder and below it that hold `split`, told by the words in their paths."""
    wanted = next((name for name, words in _SPLITS.items() if split in words), split)
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.suffix.lower() in _READERS and not any(part.startswith(".") for part in inner.parts):
            words = set(re.split(r"[^a-z0-9]+", str(inner.with_suffix("")).lower()))
            of = (name for name, own in _SPLITS.items() if not words.isdisjoint(own))
            found.setdefault(next(of, "train"), []).append(file)
    if not found:
        raise RowsError(f"{folder} holds no file of rows; allowed endings: {', '.join(_READERS)}")
    if wanted not in found:
        raise RowsError(f"{folder} has no split {split!r}; by the names of its files it has: {', '.join(found)}")
    return found[wanted]


def _read_files(files: list[Path], limit: int | None) -> Iterator[Placed]:
    return islice((placed for file in files for placed in _read_file(file)), limit)


def _read_file(path: Path) -> Iterator[Placed]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RowsError(f"{path}: ending {path.suffix!r} is not read; allowed: {', '.join(_READERS)}")
    try:
        for number, row in enumerate(reader(path), start=1):
            yield f"{path} row {number}", row
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror or error}); give a file that can") from error
    except UnicodeDecodeError as error:
        line, byte = _undecodable(path)
        raise RowsError(f"{path} line {line}: byte {byte} is not UTF-8; convert the file to UTF-8") from error


def _undecodable(path: Path) -> tuple[int, int]:
    """Line and byte of the file where it stops to be UTF-8: a decoder counts from the beginning of what it holds."""
    line = before = 0
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

    advice = "give a whole parquet file"
    with library_faults(f"{path}: not a parquet file", RowsError, advice):
        file = parquet.ParquetFile(path, memory_map=True)
    with file:
        batches = file.iter_batches(batch_size=1024)
        while True:
            with library_faults(f"{path}: damaged", RowsError, advice):
                batch = next(batches, None)
                rows = batch.to_pylist() if batch is not None else []
            if batch is None:
                return
            yield from rows


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, one row, or a row a line."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        opening = next((line.strip() for line in _lines(stream, path) if line.strip()), "")
    if not opening.startswith("[") and not _is_one_row(opening):
        yield from _read_jsonl(path)
        return
    yield from _members(path.read_text(encoding="utf-8-sig"), path)


def _members(text: str, path: Path) -> Iterator[Row]:
    """The rows of a list, or the one row, parsed one at a time: as objects, JSON takes many times its text."""
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
        raise RowsError(f"{path} line {line}: not JSON (',' or the end is expected); repair the file")


def _skip_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _parse_json(text: str, start: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise RowsError(f"{path} line {error.lineno}: not JSON ({error.msg}); repair the file") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise RowsError(f"{path}: JSON that cannot be read ({brief(error)}); repair the file") from error


def _is_one_row(opening: str) -> bool:
    """Whether a file's first line opens an object that a later one closes: it holds no more than its beginning."""
    return opening == "{" or (opening.startswith("{") and opening.endswith((",", "[", "{", ":")))


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    """Lines, none of them endless."""
    number = 0
    while line := stream.readline(MOST_ROW_CHARACTERS + 1):
        number += 1
        if len(line) > MOST_ROW_CHARACTERS:
            raise RowsError(
                f"{path} line {number}: more than {MOST_ROW_CHARACTERS:,} characters; a row has fewer: part the file "
                "into lines"
            )
        yield line


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Lines end at "\n" alone: JSON allows the other separators inside strings.
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowsError(f"{path} line {number}: not JSON ({error.msg}); repair the line") from error
                except (ValueError, RecursionError) as error:
                    raise RowsError(
                        f"{path} line {number}: JSON that cannot be read ({brief(error)}); repair the line"
                    ) from error
                yield row


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        former = csv.field_size_limit(MOST_ROW_CHARACTERS)  # the module's 131,072 is put back below
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise RowsError(
                        f"{path} line {reader.line_num}: has other columns than the first line; quote its commas"
                    )
                yield row
        except csv.Error as error:
            raise RowsError(f"{path} line {reader.line_num}: not CSV ({error}); repair the line") from error
        finally:
            csv.field_size_limit(former)


def _read_text(path: Path) -> Iterator[Row]:
    """Paragraphs, parted by blank lines."""
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
        said = " ".join(str(error).split())[:300]
        raise RowsError(f"{name}: {said}; set --dataset_config or --dataset_split") from error
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise CannotRunError(
            f"{name!r} is no file here and cannot be fetched from the hub; give a local file, or connect"
        ) from error


def _load_hub(name: str, split: str, limit: int | None, config: str | None) -> Any:
    """A data set of the hub, on disk in Arrow's form; with a limit a stream, so that no more than that is fetched."""
    from datasets import load_dataset

    with _fetching(name):
        return load_dataset(name, config, split=split, streaming=limit is not None)


def _read_hub(name: str, rows: Any, limit: int | None) -> Iterator[Placed]:
    with _fetching(name):
        for number, row in enumerate(islice(rows, limit), start=1):
            yield f"{name} row {number}", row
