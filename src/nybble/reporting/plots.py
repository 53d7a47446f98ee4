"""Draw curves as SVG text that is embedded in a page: no files, no network, readable in print.

The colours are those of Okabe and Ito, which colour-blind people can distinguish; lines also differ in their dashes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    style: str = "-"
    marker: str = ""


def draw(lines: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False, name: str = "plot") -> str:
    """An SVG element with the curves and a legend; "" if no curve has a point."""
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    with _figure(name) as (figure, axes):
        for line in lines:
            marker = line.marker or ("o" if len(set(line.x)) == 1 else "")  # a point alone has no line
            axes.plot(line.x, line.y, line.style, color=line.color, label=line.label, marker=marker, linewidth=1.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        if from_zero:
            axes.set_ylim(bottom=0)
        labelled = [line.label for line in lines if not line.label.startswith("_")]
        if len(labelled) > 1:  # above the curves, so that it covers none of them
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, fontsize=9)
        return _svg(figure, name)


def draw_intervals(
    names: Sequence[str], spans: Sequence[tuple[float, float, float]], label: str, *, name: str = "intervals"
) -> str:
    """An SVG element with a point and its interval (value, low, high) for each name; "" if there are no names."""
    if not names:
        return ""
    with _figure(name, height=0.9 + 0.42 * len(names)) as (figure, axes):
        for place, (value, low, high) in enumerate(spans):
            color = COLORS[place % len(COLORS)]
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=4, lw=1.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25)
        return _svg(figure, name)


@contextmanager
def _figure(name: str, height: float = 2.9) -> Iterator[tuple[Any, Any]]:
    # matplotlib's object interface with the SVG canvas needs no global figure and no display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # With a fixed salt and without a date, equal figures give equal bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=(4.8, height), layout="constrained")  # small enough to stay legible on a phone
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def _svg(figure: Any, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The prefix makes ids unique within the page.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" class="plot" ', 1)
