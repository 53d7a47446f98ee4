"""The command `nybble`: verbs, exit codes, and the only place where every error ends.

Each verb is a file of its own that imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nybble import __version__
from nybble.cli import (
    ask,
    chat,
    compare,
    data,
    demo,
    doctor,
    export,
    import_recipe,
    merge,
    plan,
    probe,
    quantize,
    recipes,
    report,
    resume_check,
    settings,
    train,
)
from nybble.cli.examples import examples
from nybble.cli.options import SettingsCommand
from nybble.cli.process import own_process, stop_as_by_ctrl_c
from nybble.cli.streams import make_output_unbreakable
from nybble.errors import CannotRunError, InputError, NybbleError
from nybble.guard import brief, redact, refused_by_system, visible
from nybble.hardware import is_out_of_memory
from nybble.run.quiet import quiet_libraries
from nybble.run.rendezvous import refuse_launcher
from nybble.subprocesses import report_error


class ListOfVerbs(TyperGroup):
    """The verbs, with whole sentences in terminals of any width."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each verb and what it does."""
        verbs = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=1000)) for name, verb in verbs.items() if verb])


app = typer.Typer(
    name="nybble",
    cls=ListOfVerbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help stays readable in pipes and narrow terminals
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"nybble {__version__}")
        raise typer.Exit


@app.callback()
def before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on the way; of any verb.")] = False,  # see `run`
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; of any verb.")] = False,
) -> None:
    """Fine-tune large language models in 4 bits on one GPU (AMD, NVIDIA) or on a CPU."""
    if context.invoked_subcommand not in (None, "train"):
        refuse_launcher(str(context.invoked_subcommand))


_INTERRUPTED = 130  # what shells, and some versions of typer, return for a process that SIGINT ended


def _add(name: str, verb: Callable[..., Any], cls: type[TyperCommand] = TyperCommand) -> None:
    app.command(name, cls=cls, epilog=examples(name))(verb)


_add("demo", demo.demo, cls=SettingsCommand)
_add("train", train.train, cls=SettingsCommand)
_add("plan", plan.plan, cls=SettingsCommand)
_add("data", data.data, cls=SettingsCommand)
_add("compare", compare.compare, cls=SettingsCommand)
_add("probe", probe.probe, cls=SettingsCommand)
_add("ask", ask.ask, cls=SettingsCommand)
_add("chat", chat.chat, cls=SettingsCommand)
_add("export", export.export, cls=SettingsCommand)
_add("merge", merge.merge, cls=SettingsCommand)
_add("quantize", quantize.quantize, cls=SettingsCommand)
_add("doctor", doctor.doctor)
_add("report", report.report)
_add("resume-check", resume_check.resume_check)
_add("import", import_recipe.import_recipe)
_add("recipes", recipes.recipes)
_add("settings", settings.settings)


def main() -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 3 cannot run here, 4 stopped and saved, 1 our fault."""
    make_output_unbreakable()
    own_process()
    stop_as_by_ctrl_c()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    debug, quiet = "--debug" in arguments, "--quiet" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", "--quiet")] or ["--help"]
    try:
        with quiet_libraries(), _silence() if quiet else nullcontext():
            result: Any = app(arguments, prog_name="nybble", standalone_mode=False)
    except NybbleError as error:
        return _fail(error, debug)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(debug)
    except Exception as error:  # noqa: BLE001 - the one catch-all: a fault of ours still ends in one line
        explain = getattr(error, "format_message", None)  # typer's errors about the command line have it
        if explain is not None:
            return _fail(InputError(f"{explain()} (see nybble --help)"), debug)
        if refusal := refused_by_system(error):
            return _fail(CannotRunError(f"{refusal}; make room there, or give another folder"), debug)
        if is_out_of_memory(error):
            return _fail(CannotRunError(f"out of memory ({brief(error)}); free some, or make the work smaller"), debug)
        return _fail(NybbleError(f"fault of nybble: {type(error).__name__}: {error}; --debug shows where"), debug)
    if result == _INTERRUPTED:
        return _stopped(debug)
    return result if isinstance(result, int) else 0


@contextmanager
def _silence() -> Iterator[None]:
    """Within, nothing is said of progress: that goes by the level of this logger (`nybble.run.progress`)."""
    logger = logging.getLogger("nybble")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def _stopped(debug: bool) -> int:
    _say("stopped at once; the last checkpoint is whole", debug)
    return _INTERRUPTED


def _fail(error: NybbleError, debug: bool) -> int:
    report_error(error)
    _say(str(error), debug)
    return error.exit_code


def _say(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"nybble: {visible(redact(' '.join(message.split())))}", file=sys.stderr)
