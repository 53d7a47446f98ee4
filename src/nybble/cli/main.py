"""The command `nybble`: verbs, exit codes, and the only place where every error ends.

Each verb is a file of its own that imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer

from nybble.cli import (
    ask,
    chat,
    compare,
    data,
    demo,
    doctor,
    export,
    merge,
    plan,
    probe,
    quantize,
    report,
    resume_check,
    settings,
    train,
)
from nybble.cli.process import own_process, stop_as_by_ctrl_c
from nybble.cli.terminal import visible
from nybble.errors import CannotRunError, InputError, NybbleError
from nybble.guard import redact, refused_by_system
from nybble.run.rendezvous import refuse_launcher
from nybble.subprocesses import report_error

app = typer.Typer(
    name="nybble",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes 60 ms to import
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def before(context: typer.Context) -> None:
    """Fine-tune large language models in 4 bits on one GPU (AMD, NVIDIA) or on a CPU."""
    if context.invoked_subcommand not in (None, "train"):
        refuse_launcher(str(context.invoked_subcommand))


# click's ClickException, wherever this typer keeps its click.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130  # what shells say, and some versions of typer, of a process that SIGINT ended
_FREE_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("demo", context_settings=_FREE_FLAGS)(demo.demo)
app.command("train", context_settings=_FREE_FLAGS)(train.train)
app.command("plan", context_settings=_FREE_FLAGS)(plan.plan)
app.command("data", context_settings=_FREE_FLAGS)(data.data)
app.command("compare", context_settings=_FREE_FLAGS)(compare.compare)
app.command("probe", context_settings=_FREE_FLAGS)(probe.probe)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("export", context_settings=_FREE_FLAGS)(export.export)
app.command("merge", context_settings=_FREE_FLAGS)(merge.merge)
app.command("quantize", context_settings=_FREE_FLAGS)(quantize.quantize)
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)
app.command("resume-check")(resume_check.resume_check)
app.command("settings")(settings.settings)


def main() -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 3 cannot run here, 4 stopped and saved, 1 our fault."""
    own_process()
    stop_as_by_ctrl_c()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        result: Any = app(arguments, prog_name="nybble", standalone_mode=False)
    except NybbleError as error:
        return _fail(error, debug)
    except typer.Exit as error:
        return error.exit_code
    except _UsageError as error:
        return _fail(InputError(f"{error.format_message()} (see nybble --help)"), debug)
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(debug)
    except Exception as error:  # noqa: BLE001 - the one catch-all: a fault of ours still ends in one line
        if refusal := refused_by_system(error):
            return _fail(CannotRunError(f"{refusal}; make room there, or give another folder"), debug)
        return _fail(NybbleError(f"fault of nybble: {type(error).__name__}: {error}; --debug shows where"), debug)
    if result == _INTERRUPTED:
        return _stopped(debug)
    return result if isinstance(result, int) else 0


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
