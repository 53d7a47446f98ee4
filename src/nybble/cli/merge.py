"""`nybble merge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer


def merge(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="folder of a finished run")],
    out: Annotated[str, typer.Option("--out", help="new folder for the whole model")],
    into: Annotated[
        str, typer.Option(help="dequantized, original, auto: the better of the two, or 4bit: the better, encoded anew")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: as trained")] = None,
    max_kl: Annotated[
        float, typer.Option("--max_kl", "--max-kl", help="mean KL at most, nats, of the dequantized target")
    ] = 0.01,
    max_loss_gap: Annotated[
        float, typer.Option("--max_loss_gap", "--max-loss-gap", help="loss above the adapter's at most, nats")
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="print what was measured as JSON")] = False,
) -> None:
    """Merge a run's adapter into its base, verified in a fresh process; exit code 1 where the figures do not hold."""
    from nybble.cli.flags import print_json, quiet_libraries, read_flags

    overrides = read_flags(list(context.args))
    quiet_libraries()
    from nybble import exporting
    from nybble.cli.progress import Live

    live = Live()
    try:
        limits = exporting.Limits(max_kl, max_loss_gap)
        done = exporting.merge(run, out, overrides, into=into, dtype=dtype, limits=limits, observer=live)
    finally:
        live.close()
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
    kind = "held-out" if done["rows_held_out"] else "trained"
    console.print(
        f"{done['n_rows']} {kind} rows, {done['n_positions']:,} positions, in stock transformers", markup=False
    )
    state = "verified" if done["verified"] else f"NOT VERIFIED: {'; '.join(done['faults'])}"
    console.print(
        f"{done['out']}: merged into {done['target']}, {done['dtype']}, {format_bytes(done['file_bytes'])}, {state}",
        soft_wrap=True,
        markup=False,
    )
