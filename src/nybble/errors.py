"""All errors that a user can meet, as one tree.

    NybbleError            1   an internal fault of Nybble
    ├── InputError         2   the user's input is wrong
    │   ├── RecipeError        a setting is unknown, has the wrong type, or contradicts another
    │   ├── RowsError          a rows file, or one row in it, cannot be used (the message names file and row)
    │   └── ModelError         a model or tokenizer cannot be used
    ├── CannotRunError     3   the run does not fit, or the machine lacks something
    └── StoppedError       4   the run ended early, after saving everything

A message is one line that says what was seen, what is allowed and what to do. The command line prints it and exits with
the code above; library calls raise the exceptions unchanged.
"""

from __future__ import annotations


class NybbleError(Exception):
    """The base class of all errors that Nybble raises deliberately."""

    exit_code = 1


class InputError(NybbleError):
    """The user's input is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class RowsError(InputError):
    """A rows file, or a row in it, cannot be used."""


class ModelError(InputError):
    """A model or tokenizer cannot be used."""


class CannotRunError(NybbleError):
    """The machine lacks a library, a device, memory or disk space."""

    exit_code = 3


class StoppedError(NybbleError):
    """The run ended early and saved what it had."""

    exit_code = 4


def error_class(name: str) -> type[NybbleError]:
    """The error class of that name, for an error that another process raised; `NybbleError` for any other name."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, NybbleError) else NybbleError
