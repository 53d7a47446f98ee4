"""Reading a recipe: YAML, then `--set` and flags; aliases; "did you mean"; the resolved copy.

Precedence: flag > `--set` > file > default. Keys may be flat (`learning_rate`), in a section (`training:` with
`learning_rate` below) or dotted (`training.learning_rate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nybble import bundled
from nybble.errors import RecipeError
from nybble.guard import brief, clipped, redact, shown
from nybble.recipe.catalogue import SECTIONS, Setting, all_settings, path_of
from nybble.recipe.schema import Recipe
from nybble.recipe.setting import Section

_MOST_BYTES = 16 << 10  # of a recipe; one with every setting has four thousand
_MOST_BRACKETS = 16  # within each other; PyYAML takes the square of them in time


# What functions of the library take as a recipe: one that is resolved, its settings, or its YAML file.
RecipeSource = Recipe | Mapping[str, Any] | Path | str | None


def load_recipe(
    source: Mapping[str, Any] | Path | str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe in `source` (or the defaults) with `overrides` on top.

    Args:
        source: a YAML file, or what one holds, as a mapping.
        overrides: setting name (any spelling that is understood) -> value; strings are read as YAML scalars.

    Raises:
        RecipeError: no such file, not YAML, an unknown setting, or a value that is not allowed.
    """
    values: dict[str, dict[str, Any]] = {}
    said: dict[str, str] = {}
    if not isinstance(source, Mapping | Path | str | None):
        raise RecipeError(f"recipe: got {shown(source)}; give a YAML file, a mapping of settings, or a Recipe")
    content, where = (read_yaml(source), str(source)) if isinstance(source, Path | str) else (source or {}, "recipe")
    for key, value in _flat(content, where):
        setting_path = path_of(key)
        if setting_path in said:
            raise RecipeError(f"{where}: {shown(said[setting_path])} and {shown(key)} are the same setting; keep one")
        said[setting_path] = key
        _put(values, setting_path, value)
    settings = {item.path: item for item in all_settings()}
    said = {}
    for key, value in (overrides or {}).items():
        setting_path = path_of(key)
        if setting_path in said:
            raise RecipeError(f"{shown(said[setting_path])} and {shown(key)} are the same setting; keep one")
        said[setting_path] = key
        _put(values, setting_path, _from_text(value, settings[setting_path]))
    _check_secrets(values)
    nested: dict[str, Any] = {k: v for k, v in values.items() if k}
    nested.update(values.get("", {}))
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error


def stored_recipe(record: Mapping[str, Any], where: Path) -> Recipe:
    """The recipe in a run's record.

    Raises:
        RecipeError: this version cannot read it.
    """
    try:
        return Recipe.model_validate(record["recipe"])
    except ValidationError as error:
        raise RecipeError(
            f"{where}/run.json: recipe of another version, or damaged ({_one_line(error)}); give another run"
        ) from error


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """JSON schema of what `load_recipe` reads, for editors: settings flat, in sections or dotted, by every name."""
    schema = Recipe.model_json_schema()
    top: dict[str, Any] = schema["properties"]
    sections = {name: top[name] for name in SECTIONS if name}
    for item in all_settings():
        inner = schema["$defs"][type(Recipe.model_fields[item.section].default).__name__] if item.section else schema
        known = inner["properties"]
        known[item.name] = _as_written(known[item.name])
        known.update(dict.fromkeys(item.aliases, known[item.name]))
        top.update(dict.fromkeys((item.name, item.path, *item.aliases), known[item.name]))
    for name, section in sections.items():  # some are also an alias of a setting, as model
        own = [] if top[name] is section else [top[name]]
        top[name] = {"anyOf": [section, {"type": "null"}, *own]}
    return schema


def _as_written(own: dict[str, Any]) -> dict[str, Any]:
    """The schema of a setting's value, with the other ways to write it that are understood."""
    about = {name: own[name] for name in own if name in ("title", "description", "default")}
    value = {name: own[name] for name in own if name not in (*about, "unit", "unset", "aliases", "neutral")}
    kinds = value.get("anyOf", [value])
    others: list[dict[str, Any]] = []
    types = {kind.get("type") for kind in kinds}
    if "number" in types:
        others.append({"type": "string", "pattern": r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"})  # as YAML 1.1 has 1e-3
    elif "integer" in types:
        others.append({"type": "string", "pattern": r"^[-+]?[0-9]+$"})
    if "array" in types:
        others.append({"type": "string"})  # separated by commas
    words = {word for kind in kinds for word in kind.get("enum", ())}
    if words & {"no", "always"}:
        others.append({"type": "boolean"} if "always" in words else {"const": False})
    return {**about, "anyOf": [*kinds, *others]} if others else {**about, **value}


def read_yaml(path: Path | str) -> Mapping[str, Any]:
    """The names and values of a YAML file, or of a recipe that comes with Nybble, as plain data.

    Raises:
        RecipeError: there is none, it is too large, or holds something else.
    """
    file = Path(path)
    if not file.exists():
        file = bundled.recipes().get(str(path), file)
    if not file.is_file():
        raise RecipeError(
            f"recipe {str(file)!r} does not exist; give a YAML file, a name that `nybble recipes` lists, or flags alone"
        )
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise RecipeError(
                f"{file}: {size:,} bytes; a recipe has at most {_MOST_BYTES:,}: give the YAML file of one"
            )
        content = _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror}); give a YAML file that can") from error
    except _GivenTwice as error:
        raise RecipeError(f"{file}: {error}; keep one of them") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not YAML ({_fault(error)}); repair it, see `nybble settings`") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: holds a {type(content).__name__}; a recipe is settings as `name: value`")
    return content


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {clipped(str(error.problem))}"
    return brief(error)


class _GivenTwice(yaml.YAMLError):
    """A key stands twice in one mapping; PyYAML takes the last of them."""


class _Loader(yaml.SafeLoader):
    """Plain data only, every key once.

    There are no aliases: a few lines of them stand for gigabytes, and a recipe has no use for them.
    """

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _MOST_BRACKETS:
            raise yaml.YAMLError(f"brackets {self.flow_level + 1} deep: a recipe has two levels")
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, *name: write the value itself")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        firsts: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                first = firsts.setdefault((key.tag, key.value), key)
                if first is not key:
                    line, again = first.start_mark.line + 1, key.start_mark.line + 1
                    where = f"in line {line} and again in line {again}" if again > line else f"twice in line {line}"
                    raise _GivenTwice(f"{shown(key.value)} is given {where}")
        return mapping


def _parse(text: str) -> Any:
    """YAML as plain data.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # PyYAML lets Python's own through
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_secrets(values: Mapping[str, Mapping[str, Any]]) -> None:
    """What a recipe says is written into the run, its reports and its model card."""
    for section, settings in values.items():
        for name, value in settings.items():
            if any(redact(text) != text for text in _texts_in(value)):
                raise RecipeError(
                    f"{section}{'.' if section else ''}{name}: holds a token or a password, and a recipe is kept with "
                    "the run; leave it out and log in with `hf auth login`"
                )


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, which may be a list or a mapping of others."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(inner)


def _flat(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    sections = {name for name, field in Recipe.model_fields.items() if isinstance(field.default, Section)}
    mappings = {
        spelling for item in all_settings() if item.is_mapping for spelling in (item.name, item.path, *item.aliases)
    }
    for name, value in content.items():
        key = name if isinstance(name, str) else shown(name)
        if key in sections and isinstance(value, dict):
            yield from ((f"{key}.{inner if isinstance(inner, str) else shown(inner)}", v) for inner, v in value.items())
        elif key in sections and value is None:
            continue
        elif isinstance(value, dict) and key not in mappings:
            raise RecipeError(f"{where}: unknown section {shown(key)}; allowed: {', '.join(sorted(sections))}")
        else:
            yield key, value


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
        return _parse(value)
    except _GivenTwice as error:
        raise RecipeError(f"{setting.path}: {error}; keep one of them") from error
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def first_fault(error: ValidationError) -> str:
    """The first of what pydantic found, on one line."""
    first = error.errors(include_url=False)[0]
    where = clipped(".".join(map(str, first["loc"])))
    return f"{where}: got {shown(first['input'])}; {first['msg']}" if where else first["msg"]


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    path = clipped(".".join(str(p) for p in first["loc"] if not str(p).startswith(("constrained", "function"))))
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return message
    setting = next((s for s in all_settings() if f"{path}.".startswith(f"{s.path}.")), None)
    if setting is None:
        return f"{path}: {message}"
    same = [e["msg"] for e in error.errors() if ".".join(map(str, e["loc"])).startswith(setting.path)]  # one a choice
    allowed = " or ".join(m[0].lower() + m[1:] for m in (text.removeprefix("Value error, ") for text in same))
    return f"{setting.path}: got {shown(first['input'])}; {allowed}. {setting.meaning} Default: {setting.default_text}."


def within_context(recipe: Recipe, limit: int | None, note: Callable[[str], None]) -> Recipe:
    """Rows cannot be longer than the positions that the model knows; `note` is told where they were."""
    if limit is None or recipe.data.max_length <= limit:
        return recipe
    note(f"max_length {recipe.data.max_length} is above the model's context: {limit} is used")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": limit})})
