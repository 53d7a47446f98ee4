"""`nybble ask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli.options import Seed, Temperature, TopP, takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.guard import visible


@takes_settings(("model",), without=("max_new_tokens", "seed"))
def ask(
    overrides: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a merged model.")],
    questions: Annotated[list[str] | None, typer.Argument(help="One or more questions.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Questions: a text file of lines, or .jsonl with column prompt."),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="FOLDER", help="Another adapter of the same base; may be repeated."),
    ] = None,
    system: Annotated[str, typer.Option(help="System text before each question.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="Largest length of an answer, in tokens.")
    ] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers on stdout as JSON.")] = False,
) -> None:
    """Ask the base and the tuned model the same questions.

    Settings tell where the base is now.
    """
    import_libraries()
    from dataclasses import asdict

    from nybble import generation

    asked = [*(questions or []), *(generation.read_questions(file) if file else [])]
    answers = generation.ask(
        run,
        asked,
        overrides,
        others=others or (),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    samples = [asdict(answer) for answer in answers]
    if as_json:
        print_json({"run_dir": run, "answers": samples})
    else:
        print_samples(samples)


def print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Print prompts with the answers of the base and the tuned model side by side."""
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
