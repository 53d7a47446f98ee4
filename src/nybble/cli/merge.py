"""`nybble merge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from nybble.cli.options import takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json


@takes_settings(("model", "data", "evaluation"))
def merge(
    overrides: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Folder of a finished run or of an adapter.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="New folder for the whole model.")],
    into: Annotated[
        str,
        typer.Option(
            metavar="auto|dequantized|original|4bit",
            help="The base to merge into: the dequantized one, the original one, the better of the two (auto), or the "
            "better one packed in 4 bits again (4bit).",
        ),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bfloat16|float16|float32", help="Data type of the model. Default: as trained."),
    ] = None,
    max_kl: Annotated[
        float,
        typer.Option("--max_kl", metavar="NATS", help="Largest mean KL divergence of the dequantized target."),
    ] = 0.01,
    max_loss_gap: Annotated[
        float,
        typer.Option("--max_loss_gap", metavar="NATS", help="Largest loss above that of the adapter."),
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements on stdout as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, and verify it.

    A fresh process verifies the merged model; the exit code is 1 if the limits are exceeded. Settings tell where the
    base and the rows are now. An adapter of another tool is compared on the rows of --dataset_name.
    """
    import_libraries()
    from nybble import exporting

    limits = exporting.Limits(max_kl, max_loss_gap)
    done = exporting.merge(run, out, overrides, into=into, dtype=dtype, limits=limits)
    if as_json:
        print_json(done)
    else:
        _print_verdict(done)
    if not done["verified"]:
        raise typer.Exit(1)


def _print_verdict(done: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from nybble.units import format_bytes, format_number

    table = Table("merged into", "mean KL", "worst KL", "loss", "against the adapter", "greedy equal", "stop", box=None)
    for c in done["candidates"]:
        table.add_row(
            c["target"],
            format_number(c["mean_kl"], 5),
            format_number(c["worst_kl"]),
            format_number(c["loss"]),
            f"{c['loss_gap']:+.4f}",
            f"{c['greedy_equal']}/{c['n_prompts']}",
            f"{c['stopped']}/{c['n_prompts']}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{done['n_rows']} {done['rows']} rows, {done['n_positions']:,} positions, in stock transformers", markup=False
    )
    state = "verified" if done["verified"] else f"NOT VERIFIED: {'; '.join(done['faults'])}"
    console.print(
        f"{done['out']}: merged into {done['target']}, {done['dtype']}, {format_bytes(done['file_bytes'])}, {state}",
        soft_wrap=True,
        markup=False,
    )
