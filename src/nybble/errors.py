"""Every error a user can meet, as one tree.

    NybbleError            1   a fault of ours
    ├── InputError         2   what the user gave is wrong
    │   ├── RecipeError        a setting: unknown, of the wrong type, or at odds with another
    │   ├── RowsError          a rows file, or one row in it (the message names file and row)
    │   └── ModelError         a model or tokenizer folder
    ├── CannotRunError     3   it does not fit, or the machine lacks something
    └── StoppedError       4   ended before the end, after everything was saved

A message is one line: what was seen, what is allowed, what to do. The command line prints it and exits with the
number above; as a library the exceptions are raised unchanged.
"""

from __future__ import annotations


class NybbleError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class InputError(NybbleError):
    """What the user gave is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class RowsError(InputError):
    """A rows file, or a row in it, cannot be used."""


class ModelError(InputError):
    """A model or tokenizer cannot be used."""


class CannotRunError(NybbleError):
    """The machine lacks a library, a device or room."""

    exit_code = 3


class StoppedError(NybbleError):
    """The run ended early and saved what it had."""

    exit_code = 4


def error_class(name: str) -> type[NybbleError]:
    """The error class of that name, for an error that another process raised; `NybbleError` for any other name."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, NybbleError) else NybbleError
