"""The list of all settings, for help, docs and everything that takes a setting by its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from nybble.errors import RecipeError
from nybble.guard import shown
from nybble.recipe.other_tools import ANSWERS
from nybble.recipe.schema import DataSet, Recipe
from nybble.recipe.setting import Bytes, BytesOrGiB, Numbers, Section
from nybble.units import exact_size


@dataclass(frozen=True)
class Setting:
    """One setting as help and docs show it."""

    section: str  # "" for `method`
    name: str
    default: Any = field(hash=False)  # may be a mapping
    unset: str  # what happens by default, where the default is None or empty
    values: str  # what may be given: "nf4|fp4", "NUMBER", "TOKENS", "SIZE", ...
    unit: str
    meaning: str
    aliases: tuple[str, ...]
    is_text: bool
    is_size: bool  # in bytes
    is_neutral: bool  # a resumed run may change it
    is_mapping: bool = False  # `{name: value}`

    @property
    def path(self) -> str:
        """`training.seed`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def default_text(self) -> str:
        """The default as a person would write it, with its unit."""
        if self.unset and self.default in (None, "", (), {}):
            return self.unset
        if self.is_size and self.default is not None:
            return exact_size(self.default)
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, int | float):
            return f"{self.default:g} {self.unit if self.default > 1 else ''}".strip()
        return str(self.default)


# Section -> what its settings are about; "" holds `method`.
SECTIONS = {
    "": "What is trained.",
    **{
        name: type(field.default).__doc__ or ""
        for name, field in Recipe.model_fields.items()
        if isinstance(field.default, Section)
    },
}


@cache
def all_settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the schema."""
    found = _settings_of(Recipe, "")
    for name, inner in Recipe.model_fields.items():
        if isinstance(inner.default, Section):
            found += _settings_of(type(inner.default), name)
    return tuple(found)


@cache
def spellings() -> dict[str, str]:
    """Every name of a setting -> its path: name, path and aliases."""
    return {spelling: item.path for item in all_settings() for spelling in (item.name, item.path, *item.aliases)}


def path_of(key: str, others: Iterable[str] = ()) -> str:
    """The path of the setting that `key` names, in any spelling that is understood.

    Args:
        key: with dashes or underscores, with or without its section and leading dashes.
        others: names that are no settings and could have been meant.

    Raises:
        RecipeError: there is no such setting; the message says which one may have been meant.
    """
    names = spellings()
    spelling = key.strip().lstrip("-").replace("-", "_")
    if spelling in names:
        return names[spelling]
    section, _, last = spelling.rpartition(".")
    if section and last in names and names[last].startswith(f"{section}."):
        return names[last]
    if last in ANSWERS:
        raise RecipeError(f"unknown setting {shown(key)}; {ANSWERS[last]}")
    near = difflib.get_close_matches(last, [*names, *others], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`nybble settings` lists all settings"
    raise RecipeError(f"unknown setting {shown(key)}; {hint}")


def _settings_of(section: type[Section], name: str) -> list[Setting]:
    annotations = get_type_hints(section, include_extras=True)  # pydantic takes the kind of a size off its field
    return [
        _describe(name, inner, field, annotations[inner])
        for inner, field in section.model_fields.items()
        if not isinstance(field.default, Section)
    ]


def _describe(section: str, name: str, field: FieldInfo, annotation: Any) -> Setting:
    extra: Any = field.json_schema_extra
    kinds = _kinds(annotation)
    is_size = any(kind in (Bytes, BytesOrGiB) for kind in kinds)
    return Setting(
        section=section,
        name=name,
        default=field.default,
        unset=extra["unset"],
        values="|".join(dict.fromkeys(_word_for(kind, extra["unit"]) for kind in kinds if kind is not NoneType)),
        unit=extra["unit"],
        meaning=field.description or "",
        aliases=tuple(extra["aliases"]),
        is_text=is_size or str in kinds or all(isinstance(kind, str) for kind in kinds),
        is_size=is_size,
        is_neutral=extra["neutral"],
        is_mapping=any(get_origin(kind) is dict for kind in kinds),
    )


def _kinds(annotation: Any) -> list[Any]:
    """The types and words that a value may be: `bool | Literal["a", "b"] -> [bool, "a", "b"]`."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    if get_origin(annotation) is Annotated and annotation not in (Bytes, BytesOrGiB):
        return _kinds(get_args(annotation)[0])
    return [annotation]


def _word_for(kind: Any, unit: str) -> str:
    """How the values of a type, or a value itself, are written in help and docs."""
    if kind in (int, float):
        return unit.upper() or ("INTEGER" if kind is int else "NUMBER")
    origin = get_origin(kind)
    if origin is dict and kind not in _WORDS:
        return "{NAME: NUMBER}"
    if origin is tuple and kind not in _WORDS:
        return "NUMBERS"
    return _WORDS.get(kind, str(kind))


_WORDS: dict[Any, str] = {
    bool: "true|false",
    str: "TEXT",
    tuple[str, ...]: "NAMES",
    tuple[DataSet, ...]: "SETS",
    Numbers: "{NAME: VALUE}",
    Bytes: "SIZE",
    BytesOrGiB: "SIZE",
}
