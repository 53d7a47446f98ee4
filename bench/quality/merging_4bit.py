"""4-bit merges: which base, and which encoder. Loss and KL against the adapter as trained, for all six ways.

    python -m bench.quality.merging_4bit --data ../shared/data [--cases ..] [--lengths long] [--encoders ..]

The runs are those of `bench/quality/merging.py`; `--encoders` says what packs the base that they train on. One JSON
object last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import nybble
from bench.quality.merging import ENCODERS, LENGTHS, UNLIMITED, cases
from nybble.exporting import Reference
from nybble.hardware import detect_device
from nybble.recipe import load_recipe
from nybble.run.record import Silent
from nybble.training import software_versions

merging = import_module("nybble.exporting.merge")  # the package's `merge` is the function


def six_ways(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Both bases of a run with its adapter, packed by every encoder."""
    job = merging._prepare(run, folder / "out", None, "4bit", None, UNLIMITED, Silent())
    prepared, _ = merging._rows(job)
    found = []
    with Reference(prepared.held_out, job.recipe.evaluation.max_new_tokens, job.tuned.stop_tokens) as reference:
        asked = merging._ask_adapter(job, reference)
        for encoder in ENCODERS:
            merging.ENCODER = encoder
            written = merging._Written(job, *asked)
            for target in job.bases:
                measured = written.make(target, reference, prepared)
                found.append({"base": target, "encoder": encoder, "gap": measured.loss_gap, "kl": measured.mean_kl})
            written.discard()
    return found


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and rows/")
    parser.add_argument("--cases", default="stories260K")
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--encoders", default="absmax,search")
    arguments = parser.parse_args()
    results = []
    wanted = cases(arguments.data, arguments.cases.split(","), arguments.lengths.split(","))
    for name, settings in wanted:
        for encoder in arguments.encoders.split(","):
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                where = {"output_dir": str(run), "encoder": encoder, "device": "cpu", "report_to": "none"}
                nybble.train(load_recipe(None, {**settings, **where}))
                ways = six_ways(run, Path(folder))
            results.append({"case": name, "packed_by": encoder, "ways": ways})
            for way in ways:
                print(f"{name}, {encoder}: {way['base']} by {way['encoder']} {way['gap']:+.4f} ({way['kl']:.4f})")
    device = detect_device("cpu").name
    print(json.dumps({"results": results, "device": device, "versions": software_versions()}))


if __name__ == "__main__":
    main()
