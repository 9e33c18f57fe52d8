"""Charts as plotly figures, for the page. Their script and data are part of the page's file."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from oprd.report import palette
from oprd.report.chart import (
    BubbleChart,
    Chart,
    HeatMap,
    Intervals,
    Line,
    LineChart,
    StackedBars,
    short,
)

SCALE = "Viridis"


def figure(chart: Chart) -> dict[str, Any]:
    """Return a chart's plotly figure as plain values, with numbers of six digits."""
    draws: dict[type[Chart], Any] = {
        LineChart: _lines, BubbleChart: _bubbles, HeatMap: _heat_map, StackedBars: _bars,
        Intervals: _intervals,
    }  # fmt: skip
    traces, layout = draws[type(chart)](chart)
    return _rounded(go.Figure(traces, _layout(chart, layout)).to_plotly_json())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items() if k != "template"}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False,
        "gridcolor": palette.GRID[0], "linecolor": palette.GRID[0], "ticks": "outside",
        "tickcolor": palette.GRID[0], **more,
    }  # fmt: skip


def _layout(chart: Chart, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "font": {"color": palette.INK[0], "size": 13, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False,
        "margin": {"l": 8, "r": 14, "t": 8, "b": 8}, "height": 320, "hovermode": "closest",
        "xaxis": _axis(chart.x_label), "yaxis": _axis(chart.y_label), **more,
    }  # fmt: skip


def _label(text: str) -> str:
    """Return a label as text for plotly, which reads some tags in the strings it draws."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _band(line: Line) -> go.Scatter:
    assert line.low is not None
    assert line.high is not None
    return go.Scatter(
        x=line.x + line.x[::-1], y=line.high + line.low[::-1], fill="toself", mode="lines",
        line={"width": 0}, fillcolor=palette.clear(palette.colour(line.group), 0.18),
        hoverinfo="skip", meta=line.group,
    )  # fmt: skip


def _lines(chart: LineChart) -> tuple[list[Any], dict[str, Any]]:
    traces = [_band(line) for line in chart.lines if line.low is not None]
    for line in chart.lines:
        few = len(line.x) == 1 or (chart.markers and len(line.x) <= 40)
        drawn = {"color": palette.colour(line.group), "width": 2, "dash": palette.dash(line.group)}
        traces.append(
            go.Scatter(
                x=line.x, y=line.y, name=_label(line.label), line=drawn, meta=line.group,
                mode="lines+markers" if few and line.group >= 0 else "lines",
                marker={"symbol": palette.symbol(line.group), "size": 8},
                hovertemplate="%{fullData.name}: %{y:.4g} at %{x:.5g}<extra></extra>",
            )
        )  # fmt: skip
    layout = {}
    if chart.x_log:
        ticks = sorted({x for line in chart.lines for x in line.x})
        layout["xaxis"] = _axis(
            chart.x_label, type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks]
        )
    return traces, layout


def _bubbles(chart: BubbleChart) -> tuple[list[Any], dict[str, Any]]:
    largest = max((b.size for b in chart.bubbles if math.isfinite(b.size)), default=1.0)
    traces = []
    for b in chart.bubbles:
        known = math.isfinite(b.size)
        size = 54 * math.sqrt(b.size / largest) if known and largest > 0 else 14
        fill = palette.clear(palette.colour(b.group), 0.55 if known else 0.0)
        area = f", {short(b.size)} MiB" if known else ""
        traces.append(
            go.Scatter(
                x=[b.x], y=[b.y], name=_label(b.label), mode="markers", meta=b.group,
                marker={
                    "size": size, "color": fill, "opacity": 1,
                    "line": {"color": palette.colour(b.group), "width": 2},
                },
                hovertemplate=f"%{{fullData.name}}: %{{y:.4g}} %, %{{x:.4g}} s{area}"
                "<extra></extra>",
            )
        )  # fmt: skip
    for b in chart.bubbles:  # above all circles
        traces.append(
            go.Scatter(
                x=[b.x], y=[b.y], mode="markers", meta=b.group, hoverinfo="skip",
                marker={
                    "size": 10, "symbol": palette.symbol(b.group),
                    "color": palette.colour(b.group), "line": {"color": palette.INK[0], "width": 1},
                },
            )
        )  # fmt: skip
    xs, ys = [b.x for b in chart.bubbles], [b.y for b in chart.bubbles]
    return traces, {
        "xaxis": _axis(chart.x_label, range=_around(xs)),
        "yaxis": _axis(chart.y_label, range=_around(ys)),
    }


def _around(values: list[float]) -> list[float]:
    """Return an axis's range that leaves room for bubbles."""
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.25 * abs(high) or 1.0
    return [low - room, high + room]


def _heat_map(chart: HeatMap) -> tuple[list[Any], dict[str, Any]]:
    trace = go.Heatmap(
        x=chart.x, y=[_label(r) for r in chart.rows], z=chart.z, colorscale=SCALE,
        hovertemplate=f"{chart.y_label} %{{y}}, step %{{x:.5g}}: %{{z:.4g}}<extra></extra>",
        colorbar={"title": {"text": chart.z_label, "side": "right"}, "thickness": 14, "xpad": 4},
    )  # fmt: skip
    return [trace], {"yaxis": _axis(chart.y_label, type="category")}


def _bars(chart: StackedBars) -> tuple[list[Any], dict[str, Any]]:
    traces = [
        go.Bar(
            y=[_label(n) for n in chart.labels], x=values, name=_label(part), orientation="h",
            marker={
                "color": palette.colour(i),
                "pattern": {
                    "shape": palette.PATTERNS[i % len(palette.PATTERNS)][0], "size": 8,
                    "fillmode": "overlay", "fgcolor": palette.PATTERN_INK, "solidity": 0.3,
                },
                "line": {"color": palette.GRID[0], "width": 1},
            },
            hovertemplate="%{y}: %{fullData.name} %{x:.4g} s<extra></extra>",
        )
        for i, (part, values) in enumerate(chart.parts.items())
    ]  # fmt: skip
    layout = {
        "barmode": "stack", "height": 80 + 44 * len(chart.labels),
        "yaxis": _wrapped(chart.y_label, chart.labels),
    }  # fmt: skip
    return traces, layout


def _wrapped(title: str, labels: list[str]) -> dict[str, Any]:
    """Return a category axis, first label at the top, long labels broken at spaces."""
    texts = []
    for label in labels:
        lines = [""]
        for word in label.split(" "):
            if lines[-1] and len(lines[-1]) + len(word) > 16:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        texts.append("<br>".join(_label(line) for line in lines))
    return _axis(
        "", range=[len(labels) - 0.5, -0.5], categoryorder="array",
        categoryarray=[_label(n) for n in labels], tickvals=[_label(n) for n in labels],
        ticktext=texts, type="category",
    )  # fmt: skip


def _intervals(chart: Intervals) -> tuple[list[Any], dict[str, Any]]:
    labels = [i.label for i in chart.items]
    traces: list[Any] = []
    for item in chart.items:
        known = math.isfinite(item.low)
        error = {
            "type": "data", "symmetric": False, "array": [item.high - item.value],
            "arrayminus": [item.value - item.low], "thickness": 2, "width": 7,
        } if known else None  # fmt: skip
        span = f", {short(item.low)} to {short(item.high)}" if known else ""
        traces.append(
            go.Scatter(
                x=[item.value], y=[_label(item.label)], mode="markers", error_x=error,
                meta=item.group, name=_label(item.label),
                marker={
                    "size": 12, "symbol": palette.symbol(item.group),
                    "color": palette.colour(item.group),
                },
                hovertemplate=f"%{{y}}: %{{x:.4g}}{span}<extra></extra>",
            )
        )  # fmt: skip
    shapes = [
        {
            "type": "line", "x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": palette.REFERENCE[0], "width": 1.5}, "layer": "below",
        }
        for _, value in chart.references
    ]  # fmt: skip
    notes = [
        {
            "x": value, "y": 1, "yref": "paper", "yanchor": "bottom", "text": _label(label),
            "showarrow": False, "font": {"color": palette.REFERENCE[0], "size": 12},
        }
        for label, value in chart.references
    ]  # fmt: skip
    return traces, {
        "yaxis": _wrapped(chart.y_label, labels), "height": 120 + 44 * len(labels),
        "annotations": notes, "shapes": shapes, "margin": {"l": 8, "r": 14, "t": 26, "b": 8},
    }  # fmt: skip
