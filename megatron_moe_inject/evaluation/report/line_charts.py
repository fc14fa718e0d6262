"""Line charts as PNG: several panels, a legend each, lines that may have gaps and intervals.

matplotlib is optional and imported where it is used; no global state of it (pyplot) is touched.
Names are shown as they are: what matplotlib would read as mathematics or hide is escaped.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moe_inject.evaluation.bootstrap import Interval
from megatron_moe_inject.host.errors import (
    RecipeError,
)

_DPI = 110
_MOST = 1000
"""Points of a line; beyond, neighbours are averaged."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#777777")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        x, y: of the points in their order; None in ``y`` is a gap.
        across: 95 % interval of the last point in x, None without.
        along: ... in y.
        marks: draw the points too.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    across: Interval | None = None
    along: Interval | None = None
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """One panel; ``zero`` draws the axes through 0, ``layered`` earlier lines wider, so that later
    ones on top of them leave them in sight."""

    title: str
    series: Sequence[Series]
    x: str = "iteration"
    y: str = ""
    zero: str = ""
    layered: bool = False


def thinned(x: np.ndarray, y: np.ndarray, most: int = _MOST) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points: means of neighbours, leaving out what is not finite."""
    if len(x) <= most:
        return x, y
    parts = [np.array_split(values, most) for values in (x, y)]
    means = [np.mean(p[np.isfinite(p)]) if np.isfinite(p).any() else math.nan for p in parts[1]]
    return np.array([part.mean() for part in parts[0]]), np.array(means)


def line_charts(charts: Sequence[Chart]) -> bytes:
    """The panels in two columns as a PNG.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError(
            "a report needs matplotlib, which is not installed; "
            "pip install 'megatron-moe-inject[report]'"
        ) from None
    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure((5.2 * columns, 3.1 * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, chart in zip(panels, charts, strict=False):
        _draw(axes, chart)
    for axes in panels[len(charts) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Any, chart: Chart) -> None:
    if "x" in chart.zero:
        axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    if "y" in chart.zero:
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    handles = []
    for number, series in enumerate(chart.series):
        handles.append(_line(axes, series, number))
        if chart.layered:
            handles[-1].set_linewidth(min(1.3 + 1.5 * (len(chart.series) - 1 - number), 6.0))
    axes.set_title(_plain(chart.title), fontsize=9, loc="left")
    axes.set_xlabel(_plain(chart.x), fontsize=8)
    axes.set_ylabel(_plain(chart.y), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.x == "iteration":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(handles) > 1 or chart.series[0].name:
        names = [_plain(series.name) for series in chart.series]
        axes.legend(handles, names, fontsize=7, frameon=False)


def _line(axes: Any, series: Series, number: int) -> Any:
    colour = _COLOURS[number % len(_COLOURS)]
    y = np.array([math.nan if value is None else value for value in series.y], dtype=float)
    x, y = thinned(np.array(series.x, dtype=float), y)
    marker = "o" if series.marks or len(x) < 3 else None
    style = ("-", "--", ":")[number // len(_COLOURS) % 3]
    (line,) = axes.plot(x, y, style, color=colour, linewidth=1.3, marker=marker, markersize=3.5)
    if series.across is not None or series.along is not None:
        errors = {
            name: [[max(0.0, at - interval.low)], [max(0.0, interval.high - at)]]
            for name, interval, at in (
                ("xerr", series.across, x[-1]),
                ("yerr", series.along, y[-1]),
            )
            if interval is not None
        }
        axes.errorbar(x[-1:], y[-1:], **errors, color=colour, capsize=3, linewidth=1.2)
    return line


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
