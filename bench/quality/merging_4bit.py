"""4-bit merges: which base, and which encoder. Loss and KL against the adapter as trained, for all six ways.

The runs are those of `bench/quality/merging.py`; `--encoders` says what packs the base that they train on.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nybble
from bench.harness import Option, print_table, run
from bench.quality.merging import ENCODERS, UNLIMITED, cases
from nybble.exporting import merging


def six_ways(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Both bases of a run with its adapter, packed by every encoder."""
    found = []
    usual = merging.ENCODER
    try:
        for encoder in ENCODERS:
            merging.ENCODER = encoder
            merged = nybble.merge(run, folder / f"merged-{encoder}", into="4bit", limits=UNLIMITED)
            for way in merged["candidates"]:
                figures = {"gap": way["loss_gap"], "kl": way["mean_kl"]}
                found.append({"base": way["target"], "encoder": encoder, **figures})
    finally:
        merging.ENCODER = usual
    return found


def measure(asked: Namespace) -> list[dict[str, Any]]:
    """Every case, packed by every encoder."""
    results: list[dict[str, Any]] = []

    def table() -> Iterator[tuple[str, ...]]:
        for name, settings in cases(asked.data, asked.cases, asked.lengths):
            for encoder in asked.encoders:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "run"
                    where = {"output_dir": str(out), "encoder": encoder, "device": "cpu", "report_to": "none"}
                    nybble.train(nybble.load_recipe(None, {**settings, **where}))
                    ways = six_ways(out, Path(folder))
                results.append({"case": name, "packed_by": encoder, "ways": ways})
                for way in ways:
                    yield name, encoder, way["base"], way["encoder"], f"{way['gap']:+.4f}", f"{way['kl']:.4f}"

    print_table("case | base packed by | merged into | by encoder | loss against the adapter | mean KL", table())
    return results


if __name__ == "__main__":
    run(
        measure,
        __doc__,
        Option("cases", ("stories260K",)),
        Option("lengths", ("short", "long"), tiny=("tiny",)),
        Option("encoders", ("absmax", "search"), tiny=("absmax",)),
        data=True,
    )
