"""`nybble chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nybble.cli.options import Seed, Temperature, TopP, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.guard import visible

_WAYS = "/help lists the commands, /exit or Ctrl+D leaves"
_HELP = """/base            answer without the adapter
/tuned           answer with the adapter again
/adapter NAME    answer with another adapter that was given by --with
/system TEXT     set the system text and start a new conversation
/reset           start a new conversation
/exit            leave, as does Ctrl+D; Ctrl+C stops an answer"""


@takes_settings(("model",), without=("max_new_tokens", "seed"))
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
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json_lines: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="Print JSON on stdout, one object a line: pieces of text as they come, then the whole reply.",
        ),
    ] = False,
) -> None:
    """Chat with a trained model; /help lists the commands.

    Questions are lines of stdin; answers go to stdout, and all else to stderr. Settings tell where the base is now.
    """
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
        top_p=top_p,
        seed=seed,
    )
    print(visible(f"{talk.title}; {_WAYS}"), file=sys.stderr)
    while (line := _read()) is not None:
        try:
            if line == "/exit":
                break
            if line.startswith("/"):
                _command(talk, line)
            elif line:
                _reply(talk, line, as_json_lines=as_json_lines)
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
    before = talk.title
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
    if talk.title != before:
        print(visible(f"  {talk.title}"), file=sys.stderr)


def _reply(talk: Any, line: str, *, as_json_lines: bool) -> None:
    """Print an answer as it comes; as JSON the pieces are `{"text": ..}`, and the last line has `"done": true`."""

    def say(text: str) -> None:
        if as_json_lines:
            print_json({"text": text}, flush=True)
        else:
            print(visible(text), end="", flush=True)

    try:
        reply = talk.reply(line, say)
    except KeyboardInterrupt:
        print()
        return
    if as_json_lines:
        figures = asdict(reply)
        print_json({"done": True, "prompt": line, "answer": figures.pop("text"), **figures}, flush=True)
        return
    print(flush=True)  # before the figures, which go to another stream
    end = "" if reply.stopped else ", cut at max_new_tokens or the context's end"
    print(
        f"  {reply.n_tokens} tokens, first after {reply.first_token_seconds:.2f} s, "
        f"{reply.tokens_per_second:.1f} tokens/s{end}",
        file=sys.stderr,
    )
