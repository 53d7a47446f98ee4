"""Reading a recipe: YAML, then `--set` and flags; aliases; "did you mean"; the resolved copy.

Precedence: flag > `--set` > file > default. Keys may be flat (`learning_rate`), in a section (`training:` with
`learning_rate` below) or dotted (`training.learning_rate`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from nybble.errors import RecipeError
from nybble.recipe.schema import Recipe, Section

# Settings of other tools that are not a renaming of one of ours.
_HINTS = {
    "load_in_4bit": "method: qlora",
    "load_in_8bit": "method: qlora (4 bits) or method: lora (16 bits)",
    "quantization_bit": "method: qlora",
    "adapter": "method: qlora",
    "bf16": "bnb_4bit_compute_dtype: bfloat16",
    "fp16": "bnb_4bit_compute_dtype: float16",
    "train_on_inputs": "loss_on: answers",
    "train_on_prompt": "loss_on: answers",
    "warmup_steps": "warmup_ratio",
    "eval_strategy": "eval_steps",
}


@dataclass(frozen=True)
class Setting:
    """One setting as help and docs show it."""

    section: str  # "" for `method`
    name: str
    default: Any
    type: str
    unit: str
    meaning: str
    aliases: tuple[str, ...]
    is_text: bool
    is_neutral: bool  # a resumed run may change it

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def all_settings() -> list[Setting]:
    """Every setting, in the order of the schema."""
    found = []
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, Section):
            found += [_describe(name, inner, f) for inner, f in type(field.default).model_fields.items()]
        else:
            found.append(_describe("", name, field))
    return found


def _describe(section: str, name: str, field: FieldInfo) -> Setting:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    annotation = field.annotation
    type_name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for prefix in ("typing.", "nybble.recipe.schema."):
        type_name = type_name.replace(prefix, "")
    aliases: Any = extra.get("aliases", [])
    kinds = {type(choice) if get_origin(annotation) is Literal else choice for choice in get_args(annotation)}
    return Setting(
        section=section,
        name=name,
        default=field.default,
        type=type_name,
        unit=str(extra.get("unit", "")),
        meaning=field.description or "",
        aliases=tuple(aliases),
        is_text=annotation is str or str in kinds,
        is_neutral=bool(extra.get("neutral", False)),
    )


def load_recipe(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in `path` (or the defaults) with `overrides` on top.

    Args:
        path: a YAML file.
        overrides: setting name (any spelling that is understood) -> value; strings are read as YAML scalars.

    Raises:
        RecipeError: no such file, not YAML, an unknown setting, or a value that is not allowed.
    """
    names = _spellings()
    values: dict[str, dict[str, Any]] = {}
    said: dict[str, str] = {}
    for key, value in _flat(_read(path) if path is not None else {}, str(path)):
        setting_path = _resolve(key, names)
        if setting_path in said:
            raise RecipeError(f"{path}: {said[setting_path]!r} and {key!r} are the same setting; keep one")
        said[setting_path] = key
        _put(values, setting_path, value)
    settings = {item.path: item for item in all_settings()}
    for key, value in (overrides or {}).items():
        setting_path = _resolve(key, names)
        _put(values, setting_path, _from_text(value, settings[setting_path]))
    nested: dict[str, Any] = {k: v for k, v in values.items() if k}
    nested.update(values.get("", {}))
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe in sections, for editors."""
    return Recipe.model_json_schema()


def _read(path: Path | str) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"recipe {str(file)!r} does not exist; give a YAML file, or flags alone")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets Python's own errors through
        raise RecipeError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: holds a {type(content).__name__}, a recipe is a mapping of settings")
    return content


def _flat(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    sections = {name for name, field in Recipe.model_fields.items() if isinstance(field.default, Section)}
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items())
        elif key in sections and value is None:
            continue
        elif isinstance(value, dict):
            raise RecipeError(f"{where}: unknown section {key!r}; allowed: {', '.join(sorted(sections))}")
        else:
            yield str(key), value


def _spellings() -> dict[str, str]:
    names: dict[str, str] = {}
    for item in all_settings():
        for spelling in (item.name, item.path, *item.aliases):
            names[spelling] = item.path
    return names


def _resolve(key: str, names: Mapping[str, str]) -> str:
    spelling = key.strip().lstrip("-").replace("-", "_")
    if spelling in names:
        return names[spelling]
    section, _, last = spelling.rpartition(".")
    if section and last in names and names[last].startswith(f"{section}."):
        return names[last]
    if last in _HINTS:
        raise RecipeError(f"unknown setting {key!r}; say {_HINTS[last]}")
    near = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`nybble settings` lists them all"
    raise RecipeError(f"unknown setting {key!r}; {hint}")


def _put(values: dict[str, dict[str, Any]], path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    values.setdefault(section, {})[name] = value


def _from_text(value: Any, setting: Setting) -> Any:
    """A flag's text as YAML would have it; where the setting is text itself, it stays as it is."""
    if not isinstance(value, str) or value == "":
        return value
    if setting.default is None and value.lower() in ("none", "null"):
        return None
    if setting.is_text and not value.startswith("["):
        return value
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("constrained", "function")))
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return message
    setting = next((s for s in all_settings() if f"{path}.".startswith(f"{s.path}.")), None)
    if setting is None:
        return f"{path}: {message}"
    same = [e["msg"] for e in error.errors() if ".".join(map(str, e["loc"])).startswith(setting.path)]  # one a choice
    allowed = " or ".join(m[0].lower() + m[1:] for m in (text.removeprefix("Value error, ") for text in same))
    return f"{setting.path}: got {first['input']!r}; {allowed} ({setting.meaning}; default {setting.default!r})"


def within_context(recipe: Recipe, limit: int | None, note: Callable[[str], None]) -> Recipe:
    """Rows cannot be longer than the positions that the model knows; `note` is told where they were."""
    if limit is None or recipe.data.max_length <= limit:
        return recipe
    note(f"max_length {recipe.data.max_length} is above the model's context: {limit} is used")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": limit})})
