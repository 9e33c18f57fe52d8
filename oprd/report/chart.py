"""What a chart shows, apart from how it is drawn: on the page by plotly, as PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

POINTS = 400
"""Most points of a line. More steps are shown as this many means, with their range as a band."""
COLUMNS = 200
"""Most columns of a heat map."""
ROWS = 12
"""Most points of each line in the table beside a chart."""


@dataclass
class Line:
    """One line. The band from ``low`` to ``high`` is drawn where they are given.

    Attributes:
        group: index of the group, which gives colour, dashes and symbol; -1 for a reference line.
        steps: number of recorded values behind the points.
    """

    label: str
    group: int
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    steps: int = 0


@dataclass
class Chart:
    """A chart with its words.

    Attributes:
        key: name of its PNG and its anchor on the page.
        section: heading that it stands under.
        paper: the figure of the paper that it repeats, or "".
        caption: what it shows and how to read it.
        x_label, y_label: the axes' names with units.
    """

    key: str
    section: str
    title: str
    x_label: str
    y_label: str
    caption: str = ""
    paper: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and rows of a table with the same numbers."""
        raise NotImplementedError

    def spoken(self) -> str:
        """Return the chart in words, for screen readers."""
        raise NotImplementedError

    def groups(self) -> list[int]:
        """Return the groups that the chart shows, for its legend."""
        return []


@dataclass
class LineChart(Chart):
    """Lines over a common axis."""

    lines: list[Line] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    markers: bool = False

    def table(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for line in self.lines:
            for i in spread(len(line.x), ROWS):
                span = ""
                if line.low is not None and line.high is not None:
                    span = f"{short(line.low[i])} to {short(line.high[i])}"
                rows.append([line.label, short(line.x[i]), short(line.y[i]), span])
        header = ["run", self.x_label, self.y_label, "range"]
        if not any(row[3] for row in rows):
            header, rows = header[:3], [row[:3] for row in rows]
        return header, rows

    def spoken(self) -> str:
        ends = [
            f"{line.label}: {short(line.y[0])} at {short(line.x[0])}, "
            f"{short(line.y[-1])} at {short(line.x[-1])}"
            for line in self.lines
            if line.x
        ]
        return f"Lines of {self.y_label} over {self.x_label}. {'; '.join(ends)}."

    def groups(self) -> list[int]:
        return list(dict.fromkeys(line.group for line in self.lines))


@dataclass
class Timeline(LineChart):
    """Lines over time, with named stretches behind them and levels across.

    Attributes:
        stretches: (name, from, to) on the axis of time; a name may come again.
        levels: (name, height).
    """

    stretches: list[tuple[str, float, float]] = field(default_factory=list)
    levels: list[tuple[str, float]] = field(default_factory=list)

    def spoken(self) -> str:
        levels = [f"{name}: {short(height)}" for name, height in self.levels]
        return f"{super().spoken()} Levels: {'; '.join(levels) or 'none'}."


@dataclass
class Bubble:
    """A run's place: seconds, accuracy in %, and memory in MiB (NaN: not measured)."""

    label: str
    group: int
    x: float
    y: float
    size: float


@dataclass
class BubbleChart(Chart):
    """Points whose area is a third value."""

    bubbles: list[Bubble] = field(default_factory=list)
    size_label: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        header = ["run", self.x_label, self.y_label, self.size_label]
        return header, [[b.label, short(b.x), short(b.y), short(b.size)] for b in self.bubbles]

    def spoken(self) -> str:
        parts = [f"{b.label}: {short(b.y)}, {short(b.x)}, {short(b.size)}" for b in self.bubbles]
        return (
            f"Bubbles: {self.y_label}, {self.x_label} and {self.size_label} as area. "
            f"{'; '.join(parts)}."
        )

    def groups(self) -> list[int]:
        return [b.group for b in self.bubbles]


@dataclass
class HeatMap(Chart):
    """A value by row and step."""

    x: list[float] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    z: list[list[float]] = field(default_factory=list)
    z_label: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        chosen = spread(len(self.x), 8)
        header = [self.y_label, *(f"{self.x_label} {short(self.x[i])}" for i in chosen)]
        rows = zip(self.rows, self.z, strict=True)
        return header, [[name, *(short(z[i]) for i in chosen)] for name, z in rows]

    def spoken(self) -> str:
        last = [f"{n}: {short(z[-1])}" for n, z in zip(self.rows, self.z, strict=True) if z]
        return (
            f"Heat map of {self.z_label} by {self.y_label} and {self.x_label}. "
            f"At the end, {'; '.join(last)}."
        )


@dataclass
class StackedBars(Chart):
    """Horizontal bars, one a label, of parts laid end to end; the parts are given in order."""

    labels: list[str] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def table(self) -> tuple[list[str], list[list[str]]]:
        header = ["run", *(f"{p} (s)" for p in self.parts), "sum (s)"]
        rows = []
        for i, label in enumerate(self.labels):
            values = [v[i] for v in self.parts.values()]
            rows.append([label, *map(short, values), short(sum(v for v in values if v == v))])
        return header, rows

    def spoken(self) -> str:
        parts = [
            f"{label}: " + ", ".join(f"{p} {short(v[i])}" for p, v in self.parts.items())
            for i, label in enumerate(self.labels)
        ]
        return f"Stacked bars of {self.x_label}. {'; '.join(parts)}."


@dataclass
class Interval:
    """A value with a confidence interval; both ends are NaN where none is known."""

    label: str
    group: int
    value: float
    low: float
    high: float


@dataclass
class Intervals(Chart):
    """Values side by side with their intervals, and reference lines (label, value)."""

    items: list[Interval] = field(default_factory=list)
    references: list[tuple[str, float]] = field(default_factory=list)

    def table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[i.label, short(i.value), short(i.low), short(i.high)] for i in self.items]
        rows += [[label, short(value), "-", "-"] for label, value in self.references]
        return ["run", self.x_label, "interval from", "to"], rows

    def spoken(self) -> str:
        parts = [
            f"{i.label}: {short(i.value)}"
            + (f", from {short(i.low)} to {short(i.high)}" if i.low == i.low else "")
            for i in self.items
        ]
        parts += [f"{label}: {short(value)}" for label, value in self.references]
        return f"{self.x_label} with intervals. {'; '.join(parts)}."

    def groups(self) -> list[int]:
        return [i.group for i in self.items]


def short(value: float) -> str:
    """Format a number for reading: four significant digits, "-" for NaN."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` indices below ``count``, evenly spread, with first and last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def binned(
    label: str, group: int, tracks: Sequence[tuple[np.ndarray, np.ndarray]], most: int = POINTS
) -> Line | None:
    """Return one line for the tracks of several seeds: means by step, and their range as a band.

    Args:
        tracks: (steps, values), each (S,), of each run. NaN: not recorded at this step.
        most: number of points above which steps are joined into as many bins of equal width.

    Returns:
        None if no value is recorded.
    """
    kept = [(s[ok], v[ok]) for s, v in tracks if (ok := np.isfinite(v)).any()]
    if not kept:
        return None
    steps = np.concatenate([s for s, _ in kept]).astype(np.float64)
    values = np.concatenate([v for _, v in kept])
    distinct = np.unique(steps)
    if len(distinct) > most:
        first, last = distinct[0], distinct[-1]
        bins = np.minimum(((steps - first) / (last - first) * most).astype(np.int64), most - 1)
    else:
        bins = np.searchsorted(distinct, steps)
    size = int(bins.max()) + 1
    count = np.bincount(bins, minlength=size)
    used = count > 0
    x = np.bincount(bins, steps, size)[used] / count[used]
    y = np.bincount(bins, values, size)[used] / count[used]
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, bins, values)
    np.maximum.at(high, bins, values)
    has_band = bool((count > 1).any())
    return Line(
        label,
        group,
        x.tolist(),
        y.tolist(),
        low[used].tolist() if has_band else None,
        high[used].tolist() if has_band else None,
        steps=len(distinct),
    )


def binned_rows(steps: np.ndarray, table: np.ndarray) -> tuple[list[float], list[list[float]]]:
    """Return a heat map's columns: the steps, and for each of ``table``'s columns its means.

    Args:
        steps: (S,) int64.
        table: (S, L) float64; a row of NaN is a step that recorded nothing and is left out.
    """
    lines = [binned("", 0, [(steps, column)], COLUMNS) for column in table.T]
    x = sorted({value for line in lines if line for value in line.x})
    found = [dict(zip(line.x, line.y, strict=True)) if line else {} for line in lines]
    return x, [[by.get(value, math.nan) for value in x] for by in found]


def shown_as(lines: Sequence[Line]) -> str:
    """Return the sentence that tells of a shortened line, or ""."""
    most = max((line.steps for line in lines), default=0)
    if most <= POINTS:
        return ""
    return (
        f" {most:,} recorded steps are shown as {POINTS} means; the band is their smallest and "
        "largest value."
    )
