"""Read rows from a file (`files.py`), from a folder of files or of `save_to_disk`, or from a hub id.

The rows are never all in memory: `read_rows` iterates over them once to check, count and hash them, and callers iterate
again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nybble.data.files import EXTENSIONS, Row, read_file, rows_of_batch
from nybble.errors import CannotRunError, RowsError
from nybble.guard import as_path, brief, read_object

# The row's place as messages name it ("FILE row 3"), and the row or, under `on_bad_row: skip`, why it is skipped.
Placed = tuple[str, Row | RowsError]

# Split -> words in the names of its files; files without any of these words belong to "train".
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files that describe a data set: those of `datasets` and of the hub, and text files that begin with these words.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
_PACKED = {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".lz4"}  # files that may hold rows and are not unpacked
_DESCRIPTIONS = {"readme", "license", "licence", "notice", "citation", "requirements", "changelog", "authors"}


@dataclass(frozen=True)
class Rows:
    """Rows that were checked once and can be iterated any number of times; iteration yields `Placed` rows."""

    source: str
    first: Row
    fingerprint: str  # SHA-256 of the content of all rows in order, independent of the file format
    n_bytes: int  # size of all rows as JSON
    n_rows: int
    read: Callable[[], Iterator[Placed]]
    files_not_read: tuple[str, ...] = ()  # files of the folder that are not read, as paths inside it

    def __iter__(self) -> Iterator[Placed]:
        return self.read()

    def __len__(self) -> int:
        return self.n_rows


def read_rows(
    name: str,
    split: str = "train",
    limit: int | None = None,
    config: str | None = None,
    on_bad_row: str = "stop",
) -> Rows:
    """Read and check the rows of one split.

    Args:
        name: a file, a folder of files, a folder that `save_to_disk` wrote, or a hub id.
        split: the split to read; a single file is one split, whatever its name.
        limit: read at most this many rows.
        config: the configuration of the hub's data set, if it has several.
        on_bad_row: "stop" raises at the first row that cannot be read; "skip" yields its error in its place.

    Raises:
        RowsError: the rows are missing, empty or malformed, or a folder has no such split.
        CannotRunError: the rows cannot be fetched from the hub.
    """
    if not name:
        raise RowsError("no rows given; set --dataset_name to a parquet, json, jsonl, csv or text file, or a hub id")
    path = as_path(name, RowsError)
    not_read: list[Path] = []
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _saved_files(path, split)
        if not files:
            files, not_read = _files_of(path, split)
    elif path.is_absolute() or path.suffix.lower() in EXTENSIONS or name.startswith((".", "~")) or name.count("/") > 1:
        raise RowsError(f"rows file {name!r} does not exist; give a file, a folder of files, or a hub id")
    else:
        read = partial(_read_hub, name, _load_hub(name, split, limit, config), limit)
        return _examine(name, partial(_checked, read, on_bad_row == "skip"))
    read = partial(_read_files, files, limit)
    named = tuple(str(file.relative_to(path)) for file in not_read)
    return _examine(name, partial(_checked, read, on_bad_row == "skip"), named)


def _examine(source: str, read: Callable[[], Iterator[Placed]], files_not_read: tuple[str, ...] = ()) -> Rows:
    digest = hashlib.sha256()
    first: Row | None = None
    fault: RowsError | None = None
    n_rows = 0
    n_bytes = 0
    for where, row in read():
        if isinstance(row, RowsError):
            fault = fault or row
            content = b""
        else:
            content = _content(row, where)
            first = row if first is None else first
        digest.update(content)
        digest.update(b"\n")
        n_rows += 1
        n_bytes += len(content)
    if first is None:
        if fault is not None:
            raise RowsError(f"{source}: none of its {n_rows:,} rows can be read, the first because: {fault}")
        raise RowsError(f"{source} contains no rows; give a file that contains rows")
    return Rows(source, first, digest.hexdigest(), n_bytes, n_rows, read, files_not_read)


def _checked(read: Callable[[], Iterator[tuple[str, Any]]], skips: bool) -> Iterator[Placed]:
    """Yield the rows; one that is no usable object is raised or, if `skips`, yielded as its error."""
    for where, found in read():
        try:
            yield where, _check_row(found, where)
        except RowsError as error:
            if not skips:
                raise
            yield where, error


def _check_row(found: Any, where: str) -> Row:
    if isinstance(found, RowsError):
        raise found
    if not isinstance(found, dict):
        raise RowsError(
            f"{where}: is of type {type(found).__name__}, but a row must be an object with columns; repair the file"
        )
    for value in found.values():
        if isinstance(value, str):
            check_text(value, where)
    return found


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


def _files_of(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The files below `folder` that belong to `split`, according to the words in their paths, and those not read.

    Files that describe a data set are no rows, and neither are text files beside files of other kinds.
    """
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in {*EXTENSIONS, *_PACKED}
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    kinds = {
        file: EXTENSIONS[file.suffix.lower()]
        for file in found
        if file.suffix.lower() in EXTENSIONS and not _is_description(file)
    }
    if set(kinds.values()) != {"text"}:
        kinds = {file: kind for file, kind in kinds.items() if kind != "text"}
    files_by_split: dict[str, list[Path]] = {}
    for file in kinds:
        inner = file.relative_to(folder).with_suffix("")
        words = set(re.split(r"[^a-z0-9]+", str(inner).lower()))
        named = (name for name, split_words in _SPLITS.items() if not words.isdisjoint(split_words))
        files_by_split.setdefault(next(named, "train"), []).append(file)
    if not files_by_split:
        raise RowsError(f"{folder} contains no files with rows; allowed extensions: {', '.join(EXTENSIONS)}")
    wanted = _split_name(split)
    if wanted not in files_by_split:
        splits = ", ".join(files_by_split)
        raise RowsError(f"{folder} has no split {split!r}; according to its file names it has: {splits}")
    return files_by_split[wanted], [file for file in found if file not in kinds]


def _is_description(file: Path) -> bool:
    is_text = EXTENSIONS[file.suffix.lower()] == "text"
    return file.name in _METADATA or (is_text and re.split(r"[^a-z]", file.stem.lower())[0] in _DESCRIPTIONS)


def _split_name(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split in words), split)


def _saved_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder that `save_to_disk` of `datasets` wrote; none for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _state(folder / "dataset_dict.json").get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        found = next((name for name in names if name == split), None)
        found = found or next((name for name in names if _split_name(name) == _split_name(split)), None)
        if found is None:
            raise RowsError(f"{folder} has no split {split!r}; it has: {', '.join(names) or 'none'}")
        return _data_files(folder / found)
    if not (folder / "state.json").is_file():
        return []
    if split not in ("train", _state(folder / "state.json").get("_split")):
        raise RowsError(
            f"{folder} has no split {split!r}; it was saved as one data set; remove the setting of the split"
        )
    return _data_files(folder)


def _data_files(folder: Path) -> list[Path]:
    state = _state(folder / "state.json")
    entries = state.get("_data_files")
    entries = entries if isinstance(entries, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    files = [folder / name for name in names if Path(name).name == name and (folder / name).is_file()]
    if not files or len(files) < len(names) or state.get("_indices_data_files"):
        raise RowsError(
            f"{folder}: is a folder of save_to_disk that is not complete or too old; save the rows again, e.g. with "
            "to_parquet"
        )
    return files


def _state(file: Path) -> dict[str, Any]:
    return read_object(file, RowsError, "save the data set again")


def _read_files(files: list[Path], limit: int | None) -> Iterator[tuple[str, Any]]:
    return islice((placed for file in files for placed in read_file(file)), limit)


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


def _read_hub(name: str, rows: Any, limit: int | None) -> Iterator[tuple[str, Any]]:
    with _fetching(name):
        tables = (rows if limit is None else rows.take(limit)).with_format("arrow").iter(batch_size=1024)
        batches = (batch for table in tables for batch in table.to_batches())
        for number, row in enumerate((row for batch in batches for row in rows_of_batch(batch)), start=1):
            yield f"{name} row {number}", row
