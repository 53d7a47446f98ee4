"""What comes in and what goes out: files by others are read within bounds, secrets are never written.

A file may have been made to break its reader: nested a million deep, holding a number of a million digits, a link to
something else, or such that a library fails over it in a way that it does not document. Here each of these becomes the
one documented error, before memory or time is spent.
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

MOST_JSON_BYTES = 4 << 20  # of a small file of settings; parsed, JSON takes up to 25 times its size
_MOST_DEEP = 64  # levels; the deepest settings of transformers and PEFT have six
_MOST_SHOWN = 200  # characters of somebody else's text in a message
# Tokens of the hub, and what stands before the @ of an address.
_SECRETS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=://)[^/\s@\"']+(?=@)")
_SECRET_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)\Z")
_SHORTEST_SECRET = 12  # characters; a shorter value of such a variable is a switch or a number
_LONGEST_NAME = 255  # bytes of a part of a path, on every system
_HIDDEN = "***"
_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 2


def read_object(file: Path, fault: type[InputError], advice: str, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        InputError: as `fault`: there is none, it is larger than `most_bytes`, or nested too deep; says `advice`.
    """
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise fault(f"{file}: {size:,} bytes; allowed are {most_bytes:,}; {advice}")
        return parse_object(file.read_bytes())
    except OSError as error:
        raise fault(f"{file}: cannot be read ({error.strerror or error}); {advice}") from error
    except ValueError as error:
        raise fault(f"{file}: damaged ({error}); {advice}") from error


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The JSON object that `text` is.

    Raises:
        ValueError: it is none, in a few words.
    """
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # of numbers too long for Python and of nesting as well
        raise ValueError(f"not JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not an object")  # noqa: TRY004 - one error for all faults
    check_depth(content)
    return content


def check_depth(content: Any) -> None:
    """Whatever goes through parsed JSON later does so by recursion.

    Raises:
        ValueError: it is nested deeper than any real settings.
    """
    level = [content]
    for _ in range(_MOST_DEEP):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"nested deeper than {_MOST_DEEP} levels")


def _inside(value: Any) -> list[Any]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in found if isinstance(inner, dict | list)]


@contextmanager
def library_faults(what: str, fault: type[InputError], advice: str) -> Iterator[None]:
    """Within: whatever a library raises over a file becomes `fault`, in one line. Hold library calls alone in it."""
    try:
        yield
    except NybbleError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception to Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise fault(f"{what} ({brief(error)}); {advice}") from error


def brief(error: BaseException) -> str:
    """What an error says, on one line that is not endless; its type where it says nothing by itself."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    said = " ".join(str(error).split())
    if said.startswith("Exceeds the limit"):  # Python's own, which goes on with what a programmer could do
        return "a number of more than 4,300 digits"
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said
    return clipped(said).rstrip(". ") or type(error).__name__


def refused_by_system(error: BaseException) -> str | None:
    """What the system said where it refused a file; None for any other error.

    Libraries in Rust raise exceptions of their own, which hold its number; transformers raises OSError with text alone.
    """
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return None if error.errno is None else f"{named}{error.strerror}"
    number = _OS_ERROR.search(str(error))
    return os.strerror(int(number[1])) if number else None


def clipped(text: str) -> str:
    """Text of others on one line that is not endless."""
    said = " ".join(text.split())
    return said if len(said) <= _MOST_SHOWN else f"{said[:_MOST_SHOWN]}.."


def shown(value: Any) -> str:
    """A value as a message shows it: no longer than a line, and soon made, whatever it holds."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes out no number of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"


def as_path(name: str, fault: type[InputError]) -> Path:
    """The path that `name` is, `~` included; names that no file can have are wrong before the system is asked.

    Raises:
        InputError: as `fault`: too long, a NUL or half a character in it, or the home of a user who is not here.
    """
    try:
        path = Path(name).expanduser()
        is_possible = "\0" not in name and all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)
    except (ValueError, RuntimeError) as error:
        raise fault(f"{shown(name)}: {brief(error)}; give a path that can be") from error
    if not is_possible:
        raise fault(f"{shown(name)}: no file has such a name; allowed are parts of up to {_LONGEST_NAME} bytes")
    return path


def check_links(folder: Path, fault: type[InputError] = InputError) -> None:
    """A folder by others holds no link that leaves it; the hub's cache, whose files lie in `blobs`, may.

    Raises:
        InputError: as `fault`: it holds one.
    """
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        try:
            goal = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            goal = Path("/")
        if not any(goal.is_relative_to(place) for place in homes):
            raise fault(f"{path} is a link out of its folder; only what lies in the folder is read: copy the file in")


def redact(text: str) -> str:
    """The text without the hub's tokens, passwords in addresses, and values of variables that are named as secrets."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_NAMES.search(name):
            text = text.replace(value, _HIDDEN)
    return _SECRETS.sub(_HIDDEN, text)
