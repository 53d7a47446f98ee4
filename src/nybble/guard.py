"""Guard input and output: read files from others within limits, and never write secrets.

A file may be crafted to break its reader: it may be nested a million levels deep, hold a number with a million digits,
link to something else, or make a library fail in an undocumented way. The functions here turn each of these into a
documented error before memory or time is spent.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.errors import InputError, NybbleError

MOST_JSON_BYTES = 4 << 20  # limit for a file of settings; parsing JSON takes up to 25 times its size
_MOST_DEEP = 64  # nesting levels; the deepest settings of transformers and PEFT have six
_MOST_SHOWN = 200  # characters of foreign text in a message
# Tokens of the hub, and user names and passwords before the @ of an address.
_SECRETS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=://)[^/\s@\"']+(?=@)")
_SECRET_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)\Z")
_SHORTEST_SECRET = 12  # characters; shorter values of such variables are switches or numbers
_LONGEST_NAME = 255  # bytes per part of a path, on every system
_HIDDEN = "***"
# All control characters but tab and line feed, and what turns the direction of writing.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 2


def read_object(file: Path, fault: type[InputError], advice: str, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in `file`.

    Raises:
        InputError: the file cannot be read, is larger than `most_bytes`, is nested too deeply, or holds no JSON object.
            The error is of type `fault`, and its message ends with `advice`.
    """
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise fault(f"{file}: has {size:,} bytes; at most {most_bytes:,} are allowed; {advice}")
        return parse_object(file.read_bytes())
    except OSError as error:
        raise fault(f"{file}: cannot be read ({error.strerror or error}); {advice}") from error
    except ValueError as error:
        raise fault(f"{file} is damaged ({error}); {advice}") from error


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: `text` is not a JSON object; the message says why in a few words.
    """
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # includes numbers and nesting beyond Python's limits
        raise ValueError(f"not valid JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")  # noqa: TRY004 - one error for all faults
    check_depth(content)
    return content


def check_depth(content: Any) -> None:
    """Check that parsed JSON is not nested too deeply, because later code traverses it recursively.

    Raises:
        ValueError: it is nested deeper than any real settings.
    """
    level = [content]
    for _ in range(_MOST_DEEP):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MOST_DEEP} levels")


def _inside(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]


@contextmanager
def library_faults(what: str, fault: type[InputError], advice: str) -> Iterator[None]:
    """Turn every exception of the body into a one-line `fault`; the body should contain only calls of a library."""
    try:
        yield
    except NybbleError:
        raise
    except BaseException as error:
        # The panic of a Rust library is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise fault(f"{what} ({brief(error)}); {advice}") from error


def brief(error: BaseException) -> str:
    """The message of an error on one line of limited length; the name of its type if it has no message."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    message = " ".join(str(error).split())
    if message.startswith("Exceeds the limit"):  # Python's message, which continues with advice for programmers
        return "a number has more than 4,300 digits"
    message = f"{type(error).__name__}: {message}" if isinstance(error, LookupError) else message
    return clipped(message).rstrip(". ") or type(error).__name__


def refused_by_system(error: BaseException) -> str | None:
    """The operating system's message if it refused access to a file; None for any other error.

    Rust libraries raise their own exceptions, whose text contains the error number; transformers raises OSError with
    only a text.
    """
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return None if error.errno is None else f"{named}{error.strerror}"
    number = _OS_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else None


def clipped(text: str) -> str:
    """Foreign text on one line of limited length."""
    line = " ".join(text.split())
    return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}.."


def shown(value: Any) -> str:
    """A value as a message shows it: of limited length, and computed quickly for any value."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to print a number of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to show"


def visible(text: str) -> str:
    """The text with characters that steer a terminal, or turn its writing direction, as escapes."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def as_path(name: str, fault: type[InputError]) -> Path:
    """Convert a name to a path, expand `~`, and refuse names that no file can have.

    Raises:
        InputError: the name is too long, contains a NUL or an unpaired surrogate, or names the home of an unknown user.
            The error is of type `fault`.
    """
    try:
        path = Path(name).expanduser()
        is_possible = "\0" not in name and all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)
    except (ValueError, RuntimeError) as error:
        raise fault(f"{shown(name)}: {brief(error)}; give a valid path") from error
    if not is_possible:
        raise fault(f"{shown(name)}: no file can have this name; allowed are parts of up to {_LONGEST_NAME} bytes")
    return path


def check_links(folder: Path, fault: type[InputError] = InputError) -> None:
    """Check that no link in a folder from others points out of it, except to `blobs` in the hub's cache.

    Raises:
        InputError: a link does. The error is of type `fault`.
    """
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            target = Path("/")
        if not any(target.is_relative_to(place) for place in homes):
            raise fault(
                f"{path} links to a file outside its folder, and only files inside are read; copy the file into the "
                "folder"
            )


def redact(text: str) -> str:
    """Replace tokens of the hub, passwords in addresses, and values of environment variables that are named secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_NAMES.search(name):
            text = text.replace(value, _HIDDEN)
    return _SECRETS.sub(_HIDDEN, text)
