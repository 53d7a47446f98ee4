"""`nybble ask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli.terminal import visible


def ask(
    run: Annotated[str, typer.Argument(help="folder of a run, an adapter or a merged model")],
    questions: Annotated[list[str] | None, typer.Argument(help="one or more questions")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="questions: a line each, or .jsonl with prompt")] = None,
    others: Annotated[list[str] | None, typer.Option("--with", help="another adapter of that base; may repeat")] = None,
    system: Annotated[str, typer.Option(help="system text before each question")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="length of an answer at most")
    ] = 64,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or hip; default: as trained")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust_remote_code", "--trust-remote-code", help="run Python code that the model brings along"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the answers on stdout as JSON")] = False,
) -> None:
    """Ask base and tuned model the same questions, side by side."""
    from nybble.cli.flags import print_json, quiet_libraries

    quiet_libraries()
    from dataclasses import asdict

    from nybble import generation

    asked = [*(questions or []), *(generation.read_questions(file) if file else [])]
    answers = generation.ask(
        run,
        asked,
        device,
        others=others or (),
        system=system,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )
    samples = [asdict(answer) for answer in answers]
    if as_json:
        print_json({"run_dir": run, "answers": samples})
    else:
        print_samples(samples)


def print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Prompts with the answers of base and tuned model side by side."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    for sample in samples:
        columns = {"base": sample["base"]} if sample["base"] is not None else {}
        columns |= {"tuned": sample["tuned"], **sample.get("others", {})}
        table = Table(*(Column(Text(visible(name))) for name in columns), show_lines=False, expand=True)
        table.add_row(*(Text(visible(text or "(nothing)")) for text in columns.values()))
        console.print(Text(f"\n{visible(sample['prompt'])}", style="bold"))
        console.print(table)
