"""How one setting of a recipe is defined, and the kinds of values that settings have.

A size is read here, once: a recipe says `8GiB` or `7.5GB`, the rest of the program sees bytes, and a saved recipe says
`8GiB` again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator

from nybble.guard import clipped, shown
from nybble.units import UnlikelySizeError, exact_size, parse_bytes


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    unset: str = "",
    aliases: tuple[str, ...] = (),
    neutral: bool = False,
    **limits: Any,
) -> Any:
    """Define one setting.

    Args:
        default: its value where the recipe does not say it.
        meaning: complete sentences for the help and the docs.
        unit: what a number counts, as "tokens".
        unset: what happens by default, where the default is None or empty, as "the branch main".
        aliases: other names for it, mostly those of other tools.
        neutral: it decides nothing of what is learned, or names something that counts by its content, so that a resumed
            run may change it.
        limits: pydantic's, as `ge=1`.
    """
    extra: dict[str, Any] = {"unit": unit, "unset": unset, "aliases": list(aliases), "neutral": neutral}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def split_names(text: str) -> tuple[str, ...]:
    """`"q_proj, v_proj" -> ("q_proj", "v_proj")`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_numbers(value: Any) -> Any:
    """`"0, 2" -> (0, 2)` and `3 -> (3,)`; anything else, such as a list, as it is."""
    if isinstance(value, str):
        parts = split_names(value)
        return tuple(int(part) if part.isdecimal() else part for part in parts)
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def is_name(text: str) -> bool:
    """Whether `text` is a module's name or the end of one; anything else is a regular expression."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def check_pattern(text: str) -> None:
    """Check that `text` is a regular expression.

    Raises:
        ValueError: it is none.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(
            f"{shown(text)} is not a regular expression ({clipped(str(error))}); escape what is meant literally"
        ) from error


def _reader_of_sizes(bare_unit: str) -> Callable[[Any], int]:
    """A function that reads a size as bytes; `bare_unit` is the unit of a number without one."""

    def read(value: Any) -> int:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                return parse_bytes(str(value), bare_unit)
            except UnlikelySizeError as error:
                raise ValueError(f"this is {error}") from error
            except ValueError:
                pass
        bare = f"a number of {bare_unit}" if bare_unit else "a number of bytes"
        raise ValueError(f"write an amount of memory such as 8GiB, 7.5GB or {bare}")

    return read


# Bytes; read from "8GiB", "7.5GB", "900M" or a number, and saved as text that gives the same number of bytes again.
Bytes = Annotated[
    int, BeforeValidator(_reader_of_sizes(""), json_schema_input_type=int | str), PlainSerializer(exact_size)
]
# The same, where a number without a unit counts GiB.
BytesOrGiB = Annotated[
    int, BeforeValidator(_reader_of_sizes("GiB"), json_schema_input_type=float | str), PlainSerializer(exact_size)
]
MAX_ROWS = 2**16  # of one forward pass, far beyond any device
Rate = Annotated[float, Field(gt=0)] | Literal["probe"]
Tokens = Annotated[int, Field(ge=8, le=2**24)]
# A number of optimizer steps, or, below 1, a fraction of all steps.
Steps = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
StepsOrNone = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)]  # 0: never
StepsOrEpochs = Annotated[int, Field(ge=1, le=10**9)] | Literal[-1]  # -1: as many as the epochs have
NumberedGpu = Annotated[str, Field(pattern=r"^(cuda|hip):\d{1,3}$")]
Numbers = dict[str, int | float | bool | str]  # what is given to a function by name
_OF_NUMBERS = (Rate, Steps, StepsOrNone, StepsOrEpochs)


class Section(BaseModel):
    """A group of settings that one stage reads; it cannot be changed, and unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1; a flag without its value must not become one."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted in (int, float, int | None, float | None, *_OF_NUMBERS):
            raise ValueError(f"input should be a number, not {str(value).lower()}")
        return value
