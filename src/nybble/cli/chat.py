"""`nybble chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nybble.cli.terminal import visible

_HELP = """/base            answer without the adapter
/tuned           answer with it again
/adapter NAME    answer with another one that was given by --with
/system TEXT     set the system text and begin anew
/reset           begin anew
/exit            leave (so does Ctrl+D); Ctrl+C ends an answer"""


def chat(
    run: Annotated[str, typer.Argument(help="folder of a run, an adapter or a merged model")],
    others: Annotated[list[str] | None, typer.Option("--with", help="another adapter of that base; may repeat")] = None,
    system: Annotated[str, typer.Option(help="system text")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="length of an answer at most")
    ] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or hip; default: as trained")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust_remote_code", "--trust-remote-code", help="run Python code that the model brings along"),
    ] = False,
) -> None:
    """Talk with what was trained; /help says what can be switched."""
    from nybble.cli.flags import quiet_libraries

    quiet_libraries()
    from nybble.errors import InputError
    from nybble.generation import Chat

    talk = Chat(
        run,
        device,
        others=others or (),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        trust_remote_code=trust_remote_code,
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
    """The next line, None at the end."""
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
