"""Pictures of ``oprd-gains --step``: time by phase, memory over time, and Figure 1's bubbles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd.observability.memory import GIB
from oprd.report.chart import Bubble, BubbleChart, Chart, Line, LineChart, StackedBars
from oprd.report.png import write_png

MIB = 2**20
RESIDENT = ("student's weights", "teacher's weights", "AdamW's moments")
"""Planned terms that are there before an update."""


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of a report of `oprd.benchmark.step_report`."""
    found: list[Chart | None] = [_phases(report)]
    found += [_memory(row) for row in report["rows"]]
    found += [_bubbles(report, name) for name in report["rows"][0]["accuracy"]]
    return [chart for chart in found if chart is not None]


def write_pictures(report: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Draw every chart as a PNG file; return the files' names by their captions."""
    made = {}
    for chart in charts(report):
        write_png(chart, directory / f"{chart.key}.png")
        made[f"{chart.title}. {chart.caption}"] = f"{chart.key}.png"
    return made


def _phases(report: Mapping[str, Any]) -> StackedBars:
    rows = report["rows"]
    parts = {
        phase: [row["seconds"][phase] for row in rows]
        for phase in rows[0]["seconds"]
        if any(row["seconds"][phase] > 0 for row in rows)
    }
    return StackedBars(
        "time_by_phase", "", "A training step by phase", "time of a step (s)", "",
        "Mean of the measured steps, each objective at its own lengths.",
        labels=[row["title"] for row in rows], parts=parts,
    )  # fmt: skip


def _memory(row: Mapping[str, Any]) -> LineChart | None:
    """Return the memory of one update over time, one line a stretch, with the planned levels."""
    timeline = row["timeline"]
    if timeline is None:
        return None
    unit, name = (GIB, "GiB") if max(timeline["bytes"]) >= GIB else (MIB, "MiB")
    lines, order = [], list(dict.fromkeys(phase for phase, _, _ in timeline["stretches"]))
    for phase, start, end in timeline["stretches"]:
        xs, ys = [], []
        for second, size in zip(timeline["seconds"], timeline["bytes"], strict=True):
            if start <= second <= end:
                xs.append(1000 * second)
                ys.append(size / unit)
        if xs:
            lines.append(Line(phase, order.index(phase), xs, ys))
    if not lines:
        return None
    return LineChart(
        f"memory_{row['objective']}", "", f"Memory of one update: {row['title']}", "time (ms)",
        f"above the start ({name})", "", lines=lines,
    )  # fmt: skip


def _bubbles(report: Mapping[str, Any], name: str) -> BubbleChart:
    bubbles = []
    for i, row in enumerate(report["rows"]):
        spent = sum(min(report_steps) for report_steps in [[row["ways"]["own"]]])
        size = row["delta_peak_bytes"]
        bubbles.append(
            Bubble(
                row["title"], i, spent, 100 * row["accuracy"][name],
                math.nan if size is None else size / MIB,
            )
        )  # fmt: skip
    return BubbleChart(
        f"bubbles_{name}", "", "Accuracy, time and memory", "time (s)", f"accuracy on {name} (%)",
        "", "Figure 1", bubbles=bubbles, size_label="memory (MiB)",
    )  # fmt: skip
