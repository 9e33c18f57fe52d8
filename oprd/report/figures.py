"""The charts of a report: those of the paper, for what the runs recorded, and the costs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oprd.report.boards import COMPARED
from oprd.report.boards import charts as compared
from oprd.report.chart import (
    Bubble,
    BubbleChart,
    Chart,
    HeatMap,
    Interval,
    Intervals,
    Line,
    LineChart,
    StackedBars,
    binned,
    binned_rows,
    shown_as,
)
from oprd.report.collect import Collection, Group
from oprd.report.read import number
from oprd.report.results import Final, training_seconds
from oprd.report.run import AFTER, Run

ACCURACY, STATES, OUTPUTS, COST, OPTIMISER = (
    "Accuracy",
    "Hidden states",
    "Responses and outputs",
    "Time and memory",
    "Optimisation",
)
SECTIONS = (COMPARED, ACCURACY, STATES, OUTPUTS, COST, OPTIMISER)
GIB_TO_MIB = 1024


@dataclass(frozen=True)
class Metric:
    """A number of each step that is drawn over the steps."""

    name: str
    section: str
    title: str
    y_label: str
    paper: str = ""
    caption: str = ""
    scale: float = 1.0
    expected: bool = False  # the page says so if no run has it


METRICS = (
    Metric("response_length/mean", OUTPUTS, "Response length", "tokens a response", "Figure 5",
           "Mean length of the student's rollouts, with EOS.", expected=True),
    Metric("response_length/clip_ratio", OUTPUTS, "Truncated rollouts", "share of rollouts (%)",
           "", "Rollouts that were cut at max_new_tokens, before EOS.", 100),
    Metric("rep/cosine_similarity", STATES, "Cosine similarity", "cosine (-1 to 1)", "Figure 6",
           "Student against teacher, mean over supervised tokens and layers.", expected=True),
    Metric("rep/cosine_first", STATES, "Cosine on the first tokens", "cosine (-1 to 1)",
           "Figure 8", "On the first fifth of each response.", expected=True),
    Metric("rep/cosine_last", STATES, "Cosine on the last tokens", "cosine (-1 to 1)",
           "Figure 8", "On the last fifth of each response.", expected=True),
    Metric("actor/rep_loss", STATES, "Representation loss", "loss (unit of distill.kind)"),
    Metric("actor/pg_loss", OUTPUTS, "Policy-gradient loss", "mean log p - log q (nats)",
           "Figure 9", "Student against teacher on the sampled tokens.", expected=True),
    Metric("actor/opd_topk_loss", OUTPUTS, "Top-k loss", "KL (nats a token)"),
    Metric("actor/opd_full_loss", OUTPUTS, "Full-vocabulary loss", "KL (nats a token)"),
    Metric("val-topk/overlap_ratio", OUTPUTS, "Top-k overlap", "shared of both top-k (%)",
           "Figure 10", "Tokens that are among the k likeliest of both models.", 100, True),
    Metric("actor/entropy", OUTPUTS, "Entropy of the student", "entropy (nats a token)",
           "Figure 11", "At the temperature of the rollouts.", expected=True),
    Metric("teacher/entropy", OUTPUTS, "Entropy of the teacher", "entropy (nats a token)",
           "Figure 11", "At the same positions of the student's rollouts.", expected=True),
    Metric("align/ratio", OUTPUTS, "Aligned tokens", "paired student tokens (%)", "",
           "Student tokens that end where a token of the teacher ends.", 100),
    Metric("perf/tokens_per_second", COST, "Throughput", "tokens a second"),
    Metric("mem/actor_update_delta_peak_GB", COST, "Memory of the student's update", "MiB", "",
           "Peak during the update beyond what was in use at its start.", GIB_TO_MIB),
    Metric("actor/grad_norm", OPTIMISER, "Gradient norm", "norm, before clipping"),
    Metric("actor/lr", OPTIMISER, "Learning rate", "learning rate"),
)  # fmt: skip


def figures(
    collection: Collection, finals: dict[str, list[Final]]
) -> tuple[list[Chart], list[str]]:
    """Return the charts in order, and one message for each figure that nothing was recorded for."""
    groups, missing = collection.groups, []
    charts: list[Chart] = compared(collection.boards, len(groups))
    charts += [*_comparisons(collection, finals), *_accuracy(collection)]
    if bubble := _bubbles(collection, finals):
        charts.append(bubble)
    else:
        missing.append(
            "Figure 1, accuracy, time and memory: needs a final accuracy and timed steps"
        )
    if sweep := _mu_sweep(collection):
        charts.append(sweep)
    else:
        missing.append(
            "Figure 7, accuracy by mu: needs runs of one output-space objective with two weights "
            "of oprd"
        )
    charts += _rate_choice(collection)
    for metric in METRICS:
        if chart := _over_steps(groups, metric):
            charts.append(chart)
        elif metric.expected:
            what = f"{metric.paper}, {metric.title[0].lower()}{metric.title[1:]}"
            missing.append(f"{what}: no run records {metric.name}")
    maps = _heat_maps(groups)
    charts += maps
    if not any(c.section == STATES for c in maps):
        missing.append("Cosine by layer and step: no run records rep/layer_cosine")
    ranks = _rank_sweeps(collection)
    charts += ranks
    if not ranks:
        missing.append(
            "Figure 12, cosine by rank: name a directory of oprd-bridge sweep, or runs with "
            "bridges of two ranks"
        )
    if bars := _phases(groups):
        charts.append(bars)
    if not groups and not collection.sweeps:
        missing = []
    _keys_apart(charts)
    return sorted(charts, key=lambda c: SECTIONS.index(c.section)), missing


def _keys_apart(charts: Sequence[Chart]) -> None:
    """Number the keys that are not unique: sets such as a.b and a-b have one slug."""
    seen: dict[str, int] = {}
    for chart in charts:
        count = seen[chart.key] = seen.get(chart.key, 0) + 1
        chart.key += f"-{count}" if count > 1 else ""


def _over_steps(groups: Sequence[Group], metric: Metric) -> LineChart | None:
    lines = []
    for i, group in enumerate(groups):
        tracks = [
            (r.steps, r.columns[metric.name] * metric.scale)
            for r in group.runs
            if metric.name in r.columns
        ]
        if line := binned(group.label, i, tracks):
            lines.append(line)
    if not lines:
        return None
    key = re.sub(r"[^a-z0-9]+", "-", metric.name.lower())
    caption = metric.caption + _seeds_note(groups, lines) + shown_as(lines)
    return LineChart(
        key, metric.section, metric.title, "training step", metric.y_label, caption, metric.paper,
        lines=lines,
    )  # fmt: skip


def _seeds_note(groups: Sequence[Group], lines: Sequence[Line]) -> str:
    several = any(len(groups[line.group].runs) > 1 for line in lines if line.group >= 0)
    return " Mean over seeds; the band is their range." if several else ""


def _accuracy(collection: Collection) -> list[Chart]:
    """Return accuracy over steps and over seconds, for each set that was followed in training."""
    charts: list[Chart] = []
    names = collection.sets()
    followed = [n for n in names if any(len(r.curve(n)) > 2 for r in collection.runs)] or names
    for name in followed:
        lines, timed = [], []
        for i, group in enumerate(collection.groups):
            curves = [(run, run.curve(name)) for run in group.runs]
            tracks = [
                (np.array([s for s, _ in c], np.int64), 100 * np.array([a for _, a in c]))
                for _, c in curves
                if c
            ]
            if (line := binned(group.label, i, tracks)) is None:
                continue
            lines.append(line)
            if line.steps <= len(line.x):  # one point a step: its mean time is known
                times = [_mean_seconds([r for r, c in curves if c], s) for s in line.x]
                if max(times) > 0:
                    timed.append(Line(line.label, i, times, line.y, line.low, line.high))
        if not lines:
            continue
        k = _samples(collection, name)
        label, slug = f"accuracy (Avg@{k}, %)", re.sub(r"\W+", "-", name)
        note = _seeds_note(collection.groups, lines)
        for kind, x_label, drawn in (
            ("step", "training step", lines),
            ("seconds", "time in training (s)", timed),
        ):
            if not drawn:
                continue
            caption = f"Share of right answers on {name}.{note}{shown_as(drawn)}"
            if kind == "seconds":
                caption += " Time without loading, evaluation and saving."
            references = _teacher_lines(collection, name, [x for d in drawn for x in d.x])
            charts.append(
                LineChart(
                    f"accuracy-{slug}-{kind}", ACCURACY, f"Accuracy on {name} by {kind}", x_label,
                    label, caption, "Figure 4" if kind == "step" else "",
                    lines=[*drawn, *references], markers=True,
                )
            )  # fmt: skip
    return charts


def _mean_seconds(runs: Sequence[Run], step: float) -> float:
    return statistics.fmean(run.seconds_at(int(step)) for run in runs)


def _samples(collection: Collection, name: str) -> int | str:
    found = (run.result(AFTER, name).get("samples") for run in collection.runs)
    ks = {k for k in found if isinstance(k, int)}
    return ks.pop() if len(ks) == 1 else "k"


def _teacher_lines(collection: Collection, name: str, xs: Sequence[float]) -> list[Line]:
    """Return a reference line for each accuracy of a teacher."""
    known = {round(100 * g.teacher_accuracy(name), 6) for g in collection.groups}
    ends = [min(xs), max(xs)]
    return [Line("teacher", -1, ends, [a, a]) for a in sorted(known) if math.isfinite(a)]


def _comparisons(collection: Collection, finals: dict[str, list[Final]]) -> list[Chart]:
    charts: list[Chart] = []
    index = {g.label: i for i, g in enumerate(collection.groups)}
    for name, rows in finals.items():
        teachers = sorted({round(f.teacher, 6) for f in rows if math.isfinite(f.teacher)})
        before = sorted({round(f.before, 6) for f in rows if math.isfinite(f.before)})
        references = [("teacher", t) for t in teachers]
        references += [("student before", b) for b in before] if len(before) == 1 else []
        charts.append(
            Intervals(
                f"final-{re.sub(r'[^a-zA-Z0-9]+', '-', name)}", ACCURACY,
                f"Final accuracy on {name}", f"accuracy (Avg@{_samples(collection, name)}, %)",
                "run", "After training, with 95 % intervals where they are known; the table "
                "of results says what each is over.", "",
                items=[Interval(f.label, index[f.label], f.after, f.low, f.high) for f in rows],
                references=references,
            )
        )  # fmt: skip
    return charts


def _bubbles(collection: Collection, finals: dict[str, list[Final]]) -> BubbleChart | None:
    accuracy = {f.label: f.after for f in finals.get(collection.headline or "", [])}
    bubbles = []
    for i, group in enumerate(collection.groups):
        seconds = [s for r in group.runs if math.isfinite(s := training_seconds(r))]
        peaks = [r.delta_peak for r in group.runs if math.isfinite(r.delta_peak)]
        if group.label in accuracy and seconds:
            size = max(peaks) * GIB_TO_MIB if peaks else math.nan
            y = accuracy[group.label]
            bubbles.append(Bubble(group.label, i, statistics.fmean(seconds), y, size))
    if not bubbles:
        return None
    unsized = any(math.isnan(b.size) for b in bubbles)
    return BubbleChart(
        "accuracy-time-memory", ACCURACY, "Accuracy, time and memory", "time in training (s)",
        f"accuracy on {collection.headline} (%)",
        "The area is the memory of the student's update (delta-peak). Best is small and at the top "
        "left." + (" A hollow bubble has no recorded memory." if unsized else ""),
        "Figure 1", bubbles=bubbles, size_label="memory (MiB)",
    )  # fmt: skip


def _mu_sweep(collection: Collection) -> LineChart | None:
    """Return accuracy by mu, the weight of oprd relative to that of an output-space objective."""
    name = collection.headline
    points: dict[tuple[str, str], dict[float, list[float]]] = {}
    homes: dict[tuple[str, str], int] = {}
    for i, group in enumerate(collection.groups):
        weights = {
            key.removeprefix("objectives."): number(value)
            for key, value in group.config.items()
            if key.startswith("objectives.") and number(value) > 0
        }
        others = [n for n in weights if n != "oprd"]
        if name is None or len(others) != 1:
            continue
        family = (others[0], str(group.config.get("opd.k")) if others[0] == "opd_topk" else "")
        mu = weights.get("oprd", 0.0) / weights[others[0]]
        values = [100 * number(r.result(AFTER, name).get("avg")) for r in group.runs]
        points.setdefault(family, {}).setdefault(mu, []).extend(v for v in values if v == v)
        homes.setdefault(family, i)
    lines = []
    for (objective, k), by_mu in points.items():
        mus = sorted(m for m, v in by_mu.items() if v)
        if len(mus) > 1:
            label = f"mu x OPRD + {objective}{k and f', k = {k}'}"
            ys = [by_mu[m] for m in mus]
            line = Line(label, homes[objective, k], mus, [statistics.fmean(y) for y in ys])
            if any(len(y) > 1 for y in ys):
                line.low, line.high = [min(y) for y in ys], [max(y) for y in ys]
            lines.append(line)
    if not lines:
        return None
    return LineChart(
        "mu-sweep", ACCURACY, "Weight of OPRD beside OPD (mu)", "mu (weight ratio, no unit)",
        f"accuracy on {name} (%)", "Final accuracy of L_OPD + mu * L_OPRD; mu = 0 is OPD alone.",
        "Figure 7", lines=lines, markers=True,
    )  # fmt: skip


def _rate_choice(collection: Collection) -> list[Chart]:
    """Return the last accuracy by learning rate of the runs that chose it."""
    lines = []
    labels = {g.label: i for i, g in enumerate(collection.groups)}
    sets = dict.fromkeys(n for runs in collection.tuning.values() for r in runs for n in r.sets())
    name = next((n for n in sets if n != collection.headline), collection.headline)
    for variant, runs in collection.tuning.items():
        points = {}
        for run in runs:
            curve = run.curve(name or "")
            if curve and (rate := number(run.config.get("optim.lr"))) > 0:
                points[rate] = 100 * curve[-1][1]
        if len(points) > 1 and variant in labels:
            xs = sorted(points)
            lines.append(Line(variant, labels[variant], xs, [points[x] for x in xs]))
    if not lines:
        return []
    return [
        LineChart(
            "learning-rate-choice", OPTIMISER, "Choice of the learning rate", "learning rate (log)",
            f"last accuracy on {name} (%)",
            "The comparison's runs with the tuning seed; they appear in no other chart.",
            lines=lines, x_log=True, markers=True,
        )
    ]  # fmt: skip


def _heat_maps(groups: Sequence[Group]) -> list[Chart]:
    """Return cosine by layer, and gradient norms by group of layers, of each group's first run."""
    charts: list[Chart] = []
    for i, group in enumerate(groups):
        run = group.runs[0]
        which = f" Of seed {run.seed}." if len(group.runs) > 1 else ""
        if (table := run.lists.get("rep/layer_cosine")) is not None and table.size:
            x, z = binned_rows(run.steps, table)
            charts.append(
                HeatMap(
                    f"layer-cosine-{i + 1}", STATES, f"Cosine by layer: {group.label}",
                    "training step", "layer", "Each compared layer of the student, the first at "
                    f"the bottom.{which}{_columns_note(run, x)}", "", x=x,
                    rows=[str(n) for n in range(1, len(z) + 1)], z=z, z_label="cosine",
                )
            )  # fmt: skip
        norms = {
            name.removeprefix("actor/grad_norm/"): column
            for name, column in run.columns.items()
            if name.startswith("actor/grad_norm/")
        }
        if norms:
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log10(np.stack(list(norms.values()), axis=1))
            logs[~np.isfinite(logs)] = np.nan
            x, z = binned_rows(run.steps, logs)
            charts.append(
                HeatMap(
                    f"grad-norm-groups-{i + 1}", OPTIMISER,
                    f"Gradient norm by group: {group.label}", "training step", "parameters",
                    f"Norm of each group's gradient.{which}{_columns_note(run, x)}", "", x=x,
                    rows=list(norms), z=z, z_label="log10 of the norm",
                )
            )  # fmt: skip
    return charts


def _columns_note(run: Run, x: Sequence[float]) -> str:
    return f" {len(run.steps):,} steps are shown as {len(x)} means." if len(run.steps) > 400 else ""


def _rank_sweeps(collection: Collection) -> list[Chart]:
    lines, offset = [], len(collection.groups)
    for i, (label, rows) in enumerate(collection.sweeps.items()):
        for j, (name, words) in enumerate(
            (("cosine_after", "after fitting"), ("cosine_before", "before fitting"))
        ):
            kept = [r for r in rows if math.isfinite(number(r.get(name)))]
            if kept:
                xs, ys = [number(r["rank"]) for r in kept], [number(r[name]) for r in kept]
                lines.append(Line(f"{label}, {words}", offset + 2 * i + j, xs, ys))
    trained: dict[float, list[float]] = {}
    for run in collection.runs:
        rank = number(run.config.get("bridge.rank"))
        column = run.columns.get("rep/cosine_similarity", np.zeros(0))
        known = column[np.isfinite(column)]
        if rank > 0 and len(known):
            trained.setdefault(rank, []).append(float(known[-1]))
    if len(trained) > 1:
        xs = sorted(trained)
        ys = [statistics.fmean(trained[x]) for x in xs]
        lines.append(Line("runs, at their last step", offset + 2 * len(collection.sweeps), xs, ys))
    if not lines:
        return []
    return [
        LineChart(
            "rank-sweep", STATES, "Cosine by rank of the Bridge", "rank r (log)",
            "cosine (-1 to 1)", "Mean over layers on held-out rows.", "Figure 12",
            lines=lines, x_log=True, markers=True,
        )
    ]  # fmt: skip


def _phases(groups: Sequence[Group]) -> StackedBars | None:
    kept = [g for g in groups if any(r.phases for r in g.runs)]
    names = dict.fromkeys(p for g in kept for r in g.runs for p in r.phases)
    if not names:
        return None
    parts = {
        name: [statistics.fmean(r.phases.get(name, 0.0) for r in g.runs) for g in kept]
        for name in names
    }
    several = " Mean over seeds." if any(len(g.runs) > 1 for g in kept) else ""
    return StackedBars(
        "time-by-phase", COST, "Time by phase", "time (s)", "run",
        f"Wall-clock seconds of the whole run.{several}", "",
        labels=[g.label for g in kept], parts=parts,
    )  # fmt: skip
