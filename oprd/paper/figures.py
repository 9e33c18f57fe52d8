"""The charts of ``oprd-paper``'s report, each in the section of the figure that it repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from oprd.paper import measures as m
from oprd.paper.measures import Measure, Results, Run
from oprd.paper.question import MAIN, Section
from oprd.paper.questions import SECTIONS
from oprd.paper.verdict import known_values, spread_of
from oprd.report.chart import (
    Bubble,
    BubbleChart,
    Chart,
    Interval,
    Intervals,
    Line,
    LineChart,
    StackedBars,
    binned,
)

COLOURED = ("oprd", *MAIN[:-1], "mu_1", "mu_10")
"""Rows with a hue of their own; the others follow."""
MUS = {"opd_top1": 0.0, "mu_1": 1.0, "mu_10": 10.0}
RANKS = {"bridge_r1": 1.0, "bridge_r8": 8.0, "bridge_r32": 32.0}
BAND = "Mean over seeds; the band is their range."
INTERVAL = "Over the sets. Means with 95 % intervals: over seeds, or with one seed over problems."
MEASURED = (*MAIN, "mu_1", "mu_10")


def charts(results: Results) -> list[Chart]:
    """Return the charts that the results have numbers for; ``section`` is a section's key."""
    place = {s.key: s.place for s in SECTIONS}
    found: list[Chart | None] = [
        _accuracies(results, "table-2", MAIN, "Accuracy"),
        _phases(results),
        _accuracies(
            results, "table-4", ("shape_top1", "shape_top4", "bridge_r8", "bridge_then_top1"),
            "Accuracy with a teacher of another shape", "teacher_of_other_shape",
        ),
        _accuracies(results, "table-5", _section("table-5").rows, "Accuracy of OPRD's variants"),
        _accuracies(
            results, "table-6", ("tok_bridge", "tok_student_ids"),
            "Accuracy with a teacher of another tokenizer", "teacher_of_other_tokenizer",
        ),
        _bubbles(results),
        _curves(results, "figure-4", MAIN, "step"),
        _curves(results, "figure-4", MAIN, "second"),
        _logged(results, "figure-5", "response_length/mean", "Response length",
                "tokens a response", MAIN),
        _logged(results, "figure-6", "rep/cosine_similarity", "Cosine similarity",
                "cosine (%)", MEASURED, 100),
        _by_value(results, "accuracy-by-mu", "figure-7", MUS, m.ACCURACY, "Accuracy by mu",
                  "mu (no unit)", "OPD top-1 + mu OPRD"),
        _by_count(results),
        _logged(results, "figure-9", "actor/pg_loss", "Policy-gradient loss",
                "mean log p - log q (nats)", MEASURED),
        _logged(results, "figure-10", "val-topk/overlap_ratio", "Overlap of the likeliest tokens",
                "shared of both models' likeliest (%)", MEASURED, 100),
        _logged(results, "figure-11", "actor/entropy", "Entropy of the student",
                "entropy (nats a token)", MEASURED),
        _logged(results, "figure-11", "teacher/entropy", "Entropy of the teacher",
                "entropy (nats a token)", MEASURED),
        _by_value(results, "cosine-by-rank", "figure-12", RANKS, m.BRIDGED_COSINE, "Cosine by rank",
                  "rank r (log)", "OPRD-Bridge", log=True),
        _curves(results, "batch", _section("batch").rows, "rollout"),
        _curves(results, "ends", _section("ends").rows, "step"),
        _curves(results, "forward", ("opd_full", "opd_forward", "opd_jsd"), "step"),
    ]  # fmt: skip
    made = [chart for chart in found if chart is not None]
    for chart in made:
        chart.paper = place[chart.section] if place[chart.section].startswith("F") else ""
    return made


def _section(key: str) -> Section:
    return next(s for s in SECTIONS if s.key == key)


def _group(results: Results, name: str) -> int:
    """Return a row's index for colour, dashes and symbol, the same in all charts."""
    names = [*COLOURED, *(n for n in _all_rows() if n not in COLOURED)]
    return names.index(name)


def _all_rows() -> list[str]:
    return list(dict.fromkeys(n for s in SECTIONS for n in s.rows if n not in m.MODELS))


def _accuracies(
    results: Results, section: str, rows: Sequence[str], title: str, teacher: str = "teacher"
) -> Intervals | None:
    items = []
    for name in rows:
        if found := spread_of(results, m.ACCURACY, name):
            mean, half = found
            low, high = (math.nan, math.nan) if half is None else (mean - half, mean + half)
            items.append(
                Interval(results.name(name), _group(results, name), mean, low, min(high, 100.0))
            )
    if not items:
        return None
    references = [
        (label, known[0])
        for label, model in (("student", m.STUDENT), ("teacher", teacher))
        if (known := known_values(results, m.ACCURACY, model))
    ]
    return Intervals(
        f"accuracy-{section}", section, title, "mean accuracy (%)", "row", INTERVAL,
        items=items, references=references,
    )  # fmt: skip


def _phases(results: Results) -> StackedBars | None:
    names = [n for n in _section("table-3").rows if known_values(results, m.STEP, n)]
    if not names:
        return None
    parts = {}
    for phase in ("rollout", "teacher", "student update"):
        values = [known_values(results, m.phase(phase), n) for n in names]
        parts[phase] = [statistics.fmean(v) if v else 0.0 for v in values]
    return StackedBars(
        "time-by-phase", "table-3", "Time of a step by phase", "time of a step (s)", "row",
        "Mean over the steps and seeds.",
        labels=[results.name(n) for n in names], parts=parts,
    )  # fmt: skip


def _bubbles(results: Results) -> BubbleChart | None:
    bubbles = []
    for name in MAIN:
        seconds = known_values(results, m.SECONDS, name)
        if (found := spread_of(results, m.ACCURACY, name)) and seconds:
            bubbles.append(
                Bubble(results.name(name), _group(results, name), statistics.fmean(seconds),
                       found[0], math.nan)
            )  # fmt: skip
    if not bubbles:
        return None
    return BubbleChart(
        "accuracy-and-time", "figure-1", "Accuracy and time", "time in training (s)",
        "mean accuracy (%)",
        "Best is at the top left. Means over seeds. The area of the paper's bubbles is memory, "
        "which is not compared here.",
        bubbles=bubbles, size_label="memory (MiB)",
    )  # fmt: skip


def _curves(results: Results, section: str, rows: Sequence[str], by: str) -> LineChart | None:
    """Return accuracy on the validation set by step, by second or by rollout."""
    lines = []
    for name in rows:
        runs = [run for run in results.runs(name).values() if m.curve(run)]
        tracks = [_track(m.curve(run)) for run in runs]
        if (line := binned(results.name(name), _group(results, name), tracks)) is None:
            continue
        if by == "second":
            line.x = [_mean_seconds(runs, step) for step in line.x]
        elif by == "rollout":
            line.x = [step * runs[0]["rollouts"] for step in line.x]
        lines.append(line)
    if not lines:
        return None
    ends = [0.0, max(line.x[-1] for line in lines)]
    teachers = known_values(results, m.of_set(m.VAL), "teacher")
    references = [Line("teacher", -1, ends, [t, t]) for t in teachers]
    x_label = {"step": "training step", "second": "time in training (s)", "rollout": "rollouts"}
    return LineChart(
        f"{section}-by-{by}", section, f"Validation accuracy by {by}", x_label[by],
        "accuracy (%)", BAND, lines=[*lines, *references], markers=True,
    )  # fmt: skip


def _track(curve: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([point[0] for point in curve], np.int64)
    return steps, 100 * np.array([point[2] for point in curve], np.float64)


def _mean_seconds(runs: Sequence[Run], step: float) -> float:
    return statistics.fmean(
        seconds for run in runs for at, seconds, _ in m.curve(run) if at == step
    )


def _logged(
    results: Results, section: str, metric: str, title: str, y_label: str, rows: Sequence[str],
    scale: float = 1.0,
) -> LineChart | None:  # fmt: skip
    lines = []
    for name in rows:
        tracks = []
        for run in results.runs(name).values():
            points = (run.get("logged") or {}).get(metric) or ()
            if points:
                steps, values = zip(*points, strict=True)
                tracks.append((np.array(steps, np.int64), scale * np.array(values, np.float64)))
        if line := binned(results.name(name), _group(results, name), tracks):
            lines.append(line)
    if not lines:
        return None
    key = f"{section}-{metric.replace('/', '-').replace('_', '-')}"
    return LineChart(key, section, title, "training step", y_label, BAND, lines=lines)


def _by_value(
    results: Results, key: str, section: str, values: dict[str, float], measure: Measure,
    title: str, x_label: str, label: str, log: bool = False,
) -> LineChart | None:  # fmt: skip
    """Return a measure over a setting that differs between rows."""
    found = {x: v for name, x in values.items() if (v := known_values(results, measure, name))}
    if len(found) < 2:
        return None
    line = Line(label, 0, [*found], [statistics.fmean(v) for v in found.values()])
    if any(len(v) > 1 for v in found.values()):
        line.low, line.high = ([pick(v) for v in found.values()] for pick in (min, max))
    return LineChart(
        key, section, title, x_label, f"{measure.name} ({measure.unit})", BAND,
        lines=[line], x_log=log, markers=True,
    )  # fmt: skip


def _by_count(results: Results) -> LineChart | None:
    """Return the cosine of the last layer over the first and the last k tokens, by k."""
    lines: list[Line] = []
    for name in ("oprd", "opd_top1"):
        for ends in ("first", "last"):
            tracks = []
            for run in results.runs(name).values():
                if points := (run.get("measured") or {}).get(f"cosine_{ends}_k"):
                    ks, values = zip(*points, strict=True)
                    tracks.append((np.array(ks, np.int64), 100 * np.array(values, np.float64)))
            if line := binned(f"{results.name(name)}, {ends} k", len(lines), tracks):
                lines.append(line)
    if not lines:
        return None
    return LineChart(
        "cosine-by-k", "figure-8", "Cosine of the first and the last k tokens", "k (tokens, log)",
        "cosine, last layer (%)", f"{BAND} The largest k takes whole responses.",
        lines=lines, x_log=True, markers=True,
    )  # fmt: skip
