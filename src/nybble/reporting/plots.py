"""Curves as SVG text, to be put inside a page: no files, no network, readable in print.

Colours are Okabe and Ito's, told apart by the colour-blind; lines also differ in dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


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
    """An SVG element with the curves and a legend; empty where no curve has a point."""
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    # The object interface with the SVG canvas: no global figure, no display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt and no date make the same figures give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            axes.plot(line.x, line.y, line.style, color=line.color, label=line.label, marker=line.marker, linewidth=1.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids are unique in the page, and text takes the page's colour in the light as in the dark.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" class="plot" ', 1)
