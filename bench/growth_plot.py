"""Draw how time and memory of the step grow: docs/evidence/growth.svg, from what `--suite growth` of step.py printed.

python -m bench.growth_plot bench/results/step_growth-epyc-2core-2026-11-23.json docs/evidence/growth.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito, distinct for colour-blind readers


def panels(cases: list[dict[str, Any]]) -> list[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """Label of the x axis, and the cases along it; all else is as in the middle case."""
    usual = [c for c in cases if c["recompute"] == "auto"]
    narrow = [c for c in usual if c["targets"] != "all-linear"]
    wide = [c for c in usual if c["targets"] == "all-linear"]
    tokens = sorted(((c["tokens"] / c["steps"], c) for c in narrow if c["layers"] == 8), key=lambda pair: pair[0])
    layers = sorted(((c["layers"], c) for c in narrow if c["batch"] == 4), key=lambda pair: pair[0])
    ranks = sorted(((c["r"], c) for c in wide), key=lambda pair: pair[0])
    return [("tokens a batch", tokens), ("layers", layers), ("rank, all linears", ranks)]


def main() -> None:
    """Draw."""
    source, target = map(Path, sys.argv[1:])
    found = json.loads(source.read_text(encoding="utf-8"))
    found = found.get("results", found)  # results of before the harness have their figures at the top
    with rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        rows = figure.subplots(2, 3, sharex="col", sharey="row")
        for column, (label, points) in enumerate(panels(found["cases"])):
            seconds = [c["tokens"] / c["steps"] / c["tokens_per_second"] for _, c in points]
            memory = [c["peak_bytes"] / 1e9 for _, c in points]
            rows[0][column].plot([x for x, _ in points], seconds, "o-", color=BLUE)
            rows[1][column].plot([x for x, _ in points], memory, "o-", color=ORANGE)
            rows[1][column].set_xlabel(label)
            for axes in (rows[0][column], rows[1][column]):
                axes.set_xlim(left=0)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.set_ylim(bottom=0)
                axes.grid(alpha=0.25)
                axes.spines[["top", "right"]].set_visible(False)
        rows[0][0].set_ylabel("seconds a step")
        rows[1][0].set_ylabel("peak memory, GB")
        figure.savefig(target, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
