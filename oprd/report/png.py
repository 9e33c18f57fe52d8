"""Charts as PNG files, by matplotlib, for papers and slides."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from oprd.report import palette
from oprd.report.chart import (
    BubbleChart,
    Chart,
    HeatMap,
    Intervals,
    LineChart,
    StackedBars,
    Timeline,
    short,
)
from oprd.report.fonts import drawable

SIZE, DPI = (7.0, 4.2), 130


def write_png(chart: Chart, file: Path) -> None:
    """Draw a chart into a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families, chart = drawable(chart)
    draws: dict[type[Chart], Any] = {
        LineChart: _lines, BubbleChart: _bubbles, HeatMap: _heat_map, StackedBars: _bars,
        Intervals: _intervals, Timeline: _timeline,
    }  # fmt: skip
    with plt.rc_context({"text.parse_math": False, "font.size": 10, "font.family": families}):
        figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
        title = f"{chart.title} ({chart.paper} of the paper)" if chart.paper else chart.title
        axis.set(title=title, xlabel=chart.x_label, ylabel=chart.y_label)
        axis.grid(color=palette.GRID[0], linewidth=0.7)
        axis.set_axisbelow(True)
        draws[type(chart)](chart, axis)
        figure.savefig(file, dpi=DPI)
        plt.close(figure)


def _dashes(group: int) -> Any:
    stroke = palette.STROKES[palette.dash(group)]
    return (0, [float(x) / 2 for x in stroke.split()]) if stroke else "-"


def _lines(chart: LineChart, axis: Any) -> None:
    for line in chart.lines:
        colour = palette.colour(line.group)
        marked = line.group >= 0 and (len(line.x) == 1 or (chart.markers and len(line.x) <= 40))
        axis.plot(
            line.x, line.y, color=colour, linestyle=_dashes(line.group), label=line.label,
            marker=palette.MARKERS[palette.symbol(line.group)] if marked else None, linewidth=1.6,
        )  # fmt: skip
        if line.low is not None:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    if chart.x_log:
        ticks = sorted({x for line in chart.lines for x in line.x})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    axis.legend(fontsize=8)


def _timeline(chart: Timeline, axis: Any) -> None:
    names = list(dict.fromkeys(name for name, _, _ in chart.stretches))
    for name, start, end in chart.stretches:
        axis.axvspan(start, end, color=palette.colour(names.index(name)), alpha=0.22, linewidth=0)
    marks: list[Any] = [
        axis.fill_between([], [], color=palette.colour(i), alpha=0.22, label=name)
        for i, name in enumerate(names)
    ]
    for line in chart.lines:
        marks += axis.plot(line.x, line.y, color=palette.INK[0], linewidth=1.4, label=line.label)
    for i, (name, height) in enumerate(reversed(chart.levels)):  # the highest first, as drawn
        colour, dashes = palette.colour(len(names) + i), _dashes(i + 1)
        marks.append(
            axis.axhline(height, color=colour, linestyle=dashes, linewidth=1.4, label=name)
        )
    axis.margins(x=0)
    axis.set_ylim(bottom=0)
    axis.figure.legend(handles=marks, loc="outside right upper", fontsize=8)


def _bubbles(chart: BubbleChart, axis: Any) -> None:
    largest = max((b.size for b in chart.bubbles if math.isfinite(b.size)), default=1.0)
    for b in chart.bubbles:
        known = math.isfinite(b.size) and largest > 0
        colour = palette.colour(b.group)
        axis.scatter(
            [b.x], [b.y], s=1100 * b.size / largest if known else 120, edgecolors=colour,
            facecolors=_rgba(colour, 0.55 if known else 0.0), linewidths=1.5,
        )  # fmt: skip
        axis.plot(
            [b.x], [b.y], palette.MARKERS[palette.symbol(b.group)], color=palette.INK[0],
            markerfacecolor=colour, markersize=7, zorder=3,
            label=f"{b.label}: {short(b.size)} MiB" if known else b.label,
        )  # fmt: skip
    axis.margins(0.3)
    is_sized = any(math.isfinite(b.size) for b in chart.bubbles)
    axis.legend(fontsize=8, title="memory as area" if is_sized else None, title_fontsize=8)


def _rgba(colour: str, alpha: float) -> tuple[float, ...]:
    """Return a colour as matplotlib's (r, g, b, alpha), each 0..1."""
    return (*(int(x) / 255 for x in palette.rgb(colour).split(",")), alpha)


def _heat_map(chart: HeatMap, axis: Any) -> None:
    z = np.array(chart.z, dtype=np.float64)
    edges = _edges(chart.x)
    mesh = axis.pcolormesh(edges, np.arange(len(chart.rows) + 1) - 0.5, z, cmap="viridis")
    every = max(1, len(chart.rows) // 16)
    axis.set_yticks(range(0, len(chart.rows), every), chart.rows[::every])
    axis.grid(False)
    axis.figure.colorbar(mesh, ax=axis, label=chart.z_label)


def _edges(x: list[float]) -> np.ndarray:
    """Return the borders of columns around their middles."""
    if len(x) < 2:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (np.array(x[:-1]) + np.array(x[1:])) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _bars(chart: StackedBars, axis: Any) -> None:
    left = np.zeros(len(chart.labels))
    at = np.arange(len(chart.labels))
    for i, (part, values) in enumerate(chart.parts.items()):
        axis.barh(
            at, values, left=left, label=part, color=palette.colour(i), edgecolor="white",
            hatch=palette.HATCHES[i % len(palette.HATCHES)], height=0.6,
        )  # fmt: skip
        left = left + np.array(values)
    _names(chart.labels, axis)
    axis.figure.legend(loc="outside right upper", fontsize=8)


def _intervals(chart: Intervals, axis: Any) -> None:
    for i, item in enumerate(chart.items):
        span = [[item.value - item.low], [item.high - item.value]]
        axis.errorbar(
            [item.value], [i], xerr=span if math.isfinite(item.low) else None, capsize=4,
            color=palette.colour(item.group), marker=palette.MARKERS[palette.symbol(item.group)],
            markersize=8, linestyle="none",
        )  # fmt: skip
    for label, value in chart.references:
        axis.axvline(value, color=palette.colour(-1), linewidth=1.2)
        axis.annotate(
            label, (value, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="center",
            va="bottom",
        )  # fmt: skip
    _names([i.label for i in chart.items], axis)
    if chart.references:
        axis.set_title(axis.get_title(), pad=18)


def _names(labels: list[str], axis: Any) -> None:
    axis.set_yticks(range(len(labels)), [textwrap.fill(n, 22) for n in labels])
    axis.set_ylabel("")
    axis.set_ylim(len(labels) - 0.5, -0.5)
