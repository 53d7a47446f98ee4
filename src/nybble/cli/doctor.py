"""`nybble doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from nybble.diagnostics import Report, Result


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or hip; cuda:1 is the second GPU.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the training run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results on stdout as JSON.")] = False,
) -> int:
    """Check this machine and its device.

    Every operator that training uses is computed on the device and compared with float64.
    """
    from nybble import diagnostics

    report = diagnostics.doctor(device, quick=quick)
    if as_json:
        from nybble.run.directory import to_json

        print(to_json(report.to_json()))
    else:
        _print(report)
    return 0 if report.ok else 3


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    _print_facts(console, report)
    _print_checks(console, report)
    for result in report.checks:
        if not result.ok:
            _print_failure(console, result)
    for operator, rung in report.paths.items():
        console.print(f"{operator}: {rung.path or 'no path is right'}")
        for path, why in rung.skipped.items():
            console.print(f"  {path} is skipped: {why}")
    failed = sum(not result.ok for result in report.checks)
    console.print(f"\n{len(report.checks) - failed} checks passed, {failed} failed, in {report.seconds:.1f} s")


def _print_facts(console: Console, report: Report) -> None:
    from nybble.units import format_bytes, format_count

    device, machine, rates = report.device, report.machine, report.rates
    if device:
        free = f", {format_bytes(device['free_bytes'])} free" if "free_bytes" in device else ""
        gfx = f" {device['gfx']}" if device.get("gfx") else ""
        console.print(f"{device['backend']}: {device['name']}{gfx}, {format_bytes(device['total_bytes'])}{free}")
    console.print(f"{machine['torch']}, {machine['driver'] or 'no GPU driver'}, kernel {machine['kernel']}")
    for said in report.environment:
        console.print(said)
    if rates:
        products = [f"{name.partition('_')[0]} {format_count(rate)}" for name, rate in rates.items() if "flops" in name]
        console.print(f"copies {format_bytes(rates['copy_bytes_per_second'])}/s; FLOP/s: {', '.join(products)}")
    console.print()


def _print_checks(console: Console, report: Report) -> None:
    from rich.table import Table

    table = Table("check", "path", "", "error", "allowed", "seconds", box=None, pad_edge=False)
    for result in report.checks:
        figures = ["" if value is None else f"{value:.3g}" for value in (result.max_error, result.tolerance)]
        verdict = "ok" if result.ok else "FAILED"
        table.add_row(result.name, result.path, verdict, *figures, f"{result.seconds:.2f}" if result.seconds else "")
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, why in report.not_run.items():
        reasons.setdefault(why, []).append(name)
    console.print()
    for why, names in reasons.items():
        console.print(f"not run: {', '.join(names)} ({why})")
    console.print()


def _print_failure(console: Console, result: Result) -> None:
    console.print(f"{result.name}{f' ({result.path})' if result.path else ''}")
    console.print(f"  symptom  {result.symptom}")
    console.print(f"  cause    {result.cause}")
    console.print(f"  fix      {result.fix}")
    if result.thread:
        console.print(f"  thread   {result.thread}")
    console.print()
