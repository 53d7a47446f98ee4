"""`nybble chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nybble.cli.options import takes_settings
from nybble.cli.process import import_libraries
from nybble.guard import visible

_HELP = """/base            answer without the adapter
/tuned           answer with the adapter again
/adapter NAME    answer with another adapter that was given by --with
/system TEXT     set the system text and start a new conversation
/reset           start a new conversation
/exit            leave, as does Ctrl+D; Ctrl+C stops an answer"""


@takes_settings(("model",), without=("max_new_tokens",))
def chat(
    overrides: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a merged model.")],
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="FOLDER", help="Another adapter of the same base; may be repeated."),
    ] = None,
    system: Annotated[str, typer.Option(help="System text.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="Largest length of an answer, in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Chat with a trained model; /help lists the commands. Settings tell where the base is now."""
    import_libraries()
    from nybble.errors import InputError
    from nybble.generation import Chat

    talk = Chat(
        run,
        overrides,
        others=others or (),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    while (line := _read()) is not None:
        try:
            if line == "/exit":
                break
            if line.startswith("/"):
                _command(talk, line)
            elif line:
                _reply(talk, line)
        except InputError as error:
            print(visible(str(error)), file=sys.stderr)


def _read() -> str | None:
    """The next line, or None at the end of the input."""
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        print(file=sys.stderr)
    return line.strip() if line else None


def _command(talk: Any, line: str) -> None:
    from nybble.errors import InputError

    word, _space, rest = line.partition(" ")
    if word == "/base":
        talk.use(None)
    elif word == "/tuned" and talk.adapters:
        talk.use(talk.adapters[0])
    elif word == "/adapter":
        talk.use(rest.strip())
    elif word == "/system":
        talk.reset(rest.strip())
    elif word == "/reset":
        talk.reset()
    elif word == "/help":
        print(_HELP, file=sys.stderr)
    else:
        raise InputError(f"unknown command {word}; /help lists them")


def _reply(talk: Any, line: str) -> None:
    try:
        reply = talk.reply(line, lambda text: print(visible(text), end="", flush=True))
    except KeyboardInterrupt:
        print()
        return
    print()
    end = "" if reply.stopped else ", cut at max_new_tokens or the context's end"
    print(
        f"  {reply.n_tokens} tokens, first after {reply.first_token_seconds:.2f} s, "
        f"{reply.tokens_per_second:.1f} tokens/s{end}",
        file=sys.stderr,
    )
