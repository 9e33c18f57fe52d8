"""Pictures of ``oprd-gains --step``: time by phase, memory over time, and Figure 1's bubbles."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd.observability.memory import GIB
from oprd.report.chart import Bubble, BubbleChart, Chart, Line, StackedBars, Timeline
from oprd.report.png import write_png

MIB = 2**20
BEFORE = ("weights", "optimizer")
GRADIENTS, ACTIVATIONS, LOGITS = "gradients", "activations", "logits and loss"
LEVELS = (*BEFORE, GRADIENTS, ACTIVATIONS, LOGITS)
"""Components of the plan, from the bottom."""
MOMENTS = ("AdamW's moments",)
OF_LOGITS = ("logits", "log-softmax", "log-sum-exp", "log p", "of the rows", "rows, float32", "set")
"""Parts of the names of terms that only losses on logits have."""


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


def _memory(row: Mapping[str, Any]) -> Timeline | None:
    """Return the memory of one update over time, above the levels that the plan predicts."""
    timeline = row["timeline"]
    if timeline is None:
        return None
    levels = planned_levels(row["resident_terms"], row["predicted_terms"])
    # A process's memory is also Python's and the libraries': there the plan says where it begins.
    before = timeline["start"]
    if before is None:
        before = sum(size for term, size in row["resident_terms"].items() if term != GRADIENTS)
    tops = [size for _, size in levels] + [before + size for size in timeline["bytes"]]
    unit, name = (GIB, "GiB") if max(tops) >= GIB else (MIB, "MiB")
    line = Line(
        "measured", 0, [1000 * second for second in timeline["seconds"]],
        [(before + size) / unit for size in timeline["bytes"]],
    )  # fmt: skip
    return Timeline(
        f"memory_{row['objective']}", "", f"Memory of one update: {row['title']}", "time (ms)",
        f"memory ({name})", _memory_caption(timeline, unit, name),
        lines=[line], levels=[(label, size / unit) for label, size in levels],
        stretches=[(phase, 1000 * a, 1000 * b) for phase, a, b in timeline["stretches"]],
    )  # fmt: skip


def _memory_caption(timeline: Mapping[str, Any], unit: int, name: str) -> str:
    parts = ["Dashed: the plan for these lengths, each level on those below it."]
    if timeline["start"] is None:
        parts.append(
            "Measured: the process's resident bytes, from the plan's level before the update on; "
            "the C library keeps some freed memory."
        )
    if timeline["born"]:
        born = sorted(timeline["born"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{phase} {size / unit:,.1f}" for phase, size in born)
        parts.append(f"At the peak, by the phase that allocated it ({name}): {shown}.")
    return " ".join(parts)


def planned_levels(resident: Mapping[str, int], update: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the plan's components as levels, each on top of those before it, in bytes.

    Args:
        resident: terms that are there all the time.
        update: terms of the update at its peak.
    """
    sizes = dict.fromkeys(LEVELS, 0)
    for term, size in resident.items():
        if term != GRADIENTS:  # which the update's terms have too
            sizes[BEFORE[1] if term in MOMENTS else BEFORE[0]] += size
    for term, size in update.items():
        sizes[_component(term)] += size
    levels: list[tuple[str, int]] = []
    height = 0
    for name, size in sizes.items():
        height += size
        if size:
            levels.append((f"plan: {'+ ' if levels else ''}{name}", height))
    return levels


def _component(term: str) -> str:
    """Return the level that a term of an update belongs to."""
    if term == GRADIENTS or "weight gradient" in term:
        return GRADIENTS
    if term == "temporaries":
        return BEFORE[1]
    return LOGITS if any(word in term for word in OF_LOGITS) else ACTIVATIONS


def _bubbles(report: Mapping[str, Any], name: str) -> BubbleChart:
    step = report["step"]
    steps = step["warmup"] + step["steps"]
    bubbles = []
    for i, row in enumerate(report["rows"]):
        size = row["delta_peak_bytes"]
        bubbles.append(
            Bubble(
                row["title"], i, steps * row["ways"]["own"], 100 * row["accuracy"][name],
                math.nan if size is None else size / MIB,
            )
        )  # fmt: skip
    return BubbleChart(
        f"accuracy_time_memory_{re.sub(r'[^A-Za-z0-9]+', '_', name)}", "",
        "Accuracy, time and memory", "time in training (s)", f"accuracy on {name} (%)",
        f"Accuracy on {name} after {steps} steps. The area is the delta-peak of the update. Best "
        "is small and at the top left.", "Figure 1", bubbles=bubbles, size_label="memory (MiB)",
    )  # fmt: skip
