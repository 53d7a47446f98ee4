"""The settings of a recipe as options of a verb, made from the schema.

A verb that takes settings is decorated with `takes_settings` and has an argument `overrides`: what was given on the
command line, by setting. typer parses the options; `SettingsCommand` first turns every spelling that a recipe
understands (other tools' names, dashes, `training.seed`) into the option's own, gives a flag without a value the value
true, and lists the settings in the help by section.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from nybble.errors import RecipeError
from nybble.recipe import SECTIONS, Setting, all_settings, path_of

_INDENT = 6  # of a setting's meaning, which stands below its name

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set one setting of the recipe; may be repeated."),
]
RecipeFile = Annotated[
    str | None,
    typer.Argument(
        help="A recipe: a YAML file, or a name that `nybble recipes` lists. Without one, every setting has its default."
    ),
]

Temperature = Annotated[
    float, typer.Option("--temperature", metavar="NUMBER", help="Sampling temperature; 0 takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top_p", metavar="NUMBER", help="Draw from the likeliest tokens that have this probability together."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="INTEGER", help="Draw the same answers each time.", show_default=False),
]


def takes_settings(
    sections: Sequence[str] = tuple(SECTIONS), *, without: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds the settings, and `--set`, to the options of a verb.

    Args:
        sections: sections whose settings the verb's help lists; it accepts the others as well, so that the verb itself
            can say why it does not take one.
        without: settings that the verb has an option of its own for.
    """
    settings = [item for item in all_settings() if item.name not in without]

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(verb, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "overrides"]
        added = [_parameter("assignments", Assignments)]
        added += [_parameter(item.name, _option(item, is_listed=item.section in sections)) for item in settings]

        @functools.wraps(verb)
        def call(**given: Any) -> Any:
            overrides = _assigned(given.pop("assignments") or [])
            for item in settings:
                value = given.pop(item.name)
                if value or value == "":
                    overrides[item.name] = value if isinstance(value, str) else ",".join(value)
            return verb(overrides=overrides, **given)

        vars(call)["__signature__"] = signature.replace(parameters=[*own, *added])
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
        return call

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(item: Setting, *, is_listed: bool) -> Any:
    names = f" Other names: {', '.join(item.aliases)}." if item.aliases else ""
    kind: Any = list[str] | None if item.values == "NAMES" else str | None  # names may be given one by one
    return Annotated[
        kind,
        typer.Option(
            f"--{item.name}",
            metavar=item.values,
            help=f"{item.meaning} Default: {item.default_text}.{names}",
            rich_help_panel=item.section,
            hidden=not is_listed,
        ),
    ]


def _assigned(assignments: Sequence[str]) -> dict[str, str]:
    """`["training.seed=1"] -> {"seed": "1"}`.

    Raises:
        RecipeError: an assignment without `=`, or of an unknown setting.
    """
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set {assignment!r} has no '='; write --set name=value")
        found[path_of(name).rpartition(".")[2]] = value
    return found


class SettingsCommand(TyperCommand):
    """A verb with settings among its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the verb, in any spelling that a recipe understands."""
        own: dict[str, tuple[str, bool]] = {}
        for param in self.get_params(ctx):
            for option in [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else []:
                is_flag = param.name == "help" or bool(getattr(param, "is_flag", False))
                own[_plain(option)] = (option, is_flag)
        return super().parse_args(ctx, list(respelt(args, own)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the verb's own options and then the settings, section by section."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panel = getattr(param, "rich_help_panel", None)
                panel = (
                    panel if panel is not None else ("Arguments" if param.param_type_name == "argument" else "Options")
                )
                panels.setdefault(panel, []).append(record)
        for panel in ("Arguments", "Options"):
            if panel in panels:
                with formatter.section(panel):
                    formatter.write_dl(panels[panel])
        for name, meaning in SECTIONS.items():
            if name in panels:
                with formatter.section(f"{name.capitalize()} settings" if name else meaning.rstrip(".")):
                    if name:
                        formatter.write_text(meaning)
                    formatter.write_dl(panels[name], col_max=_INDENT - 2)


def respelt(words: Sequence[str], own: dict[str, tuple[str, bool]]) -> Iterator[str]:
    """The words of a command line with every option in the spelling that its verb declares.

    `--lr=1 --no-cache --packing` becomes `--learning_rate=1 --cache=false --packing=true`.

    Args:
        words: what was typed after the verb.
        own: the verb's options, settings among them: plain spelling -> (declared spelling, whether it takes no value).

    Raises:
        RecipeError: an option is neither the verb's nor a setting.
    """
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            yield from (word, *left)
            return
        if not word.startswith("--"):
            yield word
            continue
        name, equals, value = word[2:].partition("=")
        declared, is_flag = own.get(_plain(name), ("", False))
        if declared and _plain(name) not in _SETTINGS:
            yield declared + equals + value
            if not equals and not is_flag and left:
                yield left.pop(0)
            continue
        if not equals and left and not left[0].startswith("--"):
            value = left.pop(0)
        elif not equals:
            is_off = name.startswith(("no-", "no_"))
            name, value = (name[3:], "false") if is_off else (name, "true")
        setting = path_of(name, own).rpartition(".")[2]
        yield f"{own[setting][0]}={value}"


_SETTINGS = {item.name for item in all_settings()}


def _plain(option: str) -> str:
    """`--auto-resume -> auto_resume`."""
    return option.lstrip("-").replace("-", "_")
