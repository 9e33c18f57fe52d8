"""Final results of groups: accuracy with 95 % intervals, and the settings that differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oprd.report.chart import short
from oprd.report.collect import Collection, Group, compared_settings
from oprd.report.read import number
from oprd.report.run import AFTER, BEFORE, Run
from oprd.report.samples import Problem, problem_grades

Z = 1.96
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, .. 30 degrees of freedom."""


@dataclass(frozen=True)
class Final:
    """A group's final accuracy on one set, in percent; NaN where unknown.

    Attributes:
        low, high: 95 % interval.
        source: what the interval is over, in words.
        k: samples a prompt.
        truncated: share of responses that were cut, in percent.
    """

    label: str
    name: str
    before: float
    after: float
    low: float
    high: float
    source: str
    teacher: float
    k: int | None
    best: float
    length: float
    truncated: float


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval, cut to 0..1, of the mean of at least two shares."""
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else Z
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of ``count`` problems."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count)
    half *= math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return middle - half, middle + half


def interval(
    values: Sequence[float], result: Mapping[str, Any], grades: Sequence[float]
) -> tuple[float, float, str]:
    """Return a 95 % interval, 0..1, and what it is over. NaN and a reason if nothing gives one.

    Args:
        values: final accuracies of the seeds.
        result: the first seed's result.
        grades: mean grade of each problem, if its samples were kept.
    """
    if len(values) > 1 and len(set(values)) == 1:
        return math.nan, math.nan, f"unknown: {len(values)} seeds with the same result"
    if len(values) > 1:
        return *over_seeds(values), f"{len(values)} seeds (Student's t)"
    share = values[0] if values else math.nan
    count, error = number(result.get("problems")), number(result.get("stderr"))
    if len(grades) > 1 and math.isnan(count):
        count = float(len(grades))
    if len(grades) > 1 and math.isnan(error):
        error = statistics.stdev(grades) / math.sqrt(len(grades))
    one_sample = result.get("samples") == 1 and 0 <= share <= 1
    if one_sample and count > 0:
        return *wilson(share, count), f"{short(count)} problems (Wilson)"
    if error >= 0:
        over = f"{short(count)} problems" if count > 0 else "problems"
        low, high = max(share - Z * error, 0.0), min(share + Z * error, 1.0)
        return low, high, f"{over} (standard error)"
    return math.nan, math.nan, "unknown: one seed, and no record of the problems"


def final(group: Group, name: str, samples: Mapping[str, list[Problem]]) -> Final | None:
    """Return a group's final results on a set; None if its student has none.

    Args:
        samples: by the run's directory, the problems whose responses were kept.
    """
    results = [(run, r) for run in group.runs if (r := run.result(AFTER, name))]
    known = [(run, r) for run, r in results if math.isfinite(number(r.get("avg")))]
    if not known:
        return None
    run, first = known[0]
    grades = problem_grades(samples.get(str(run.directory), []), AFTER, name)
    values = [number(r.get("avg")) for _, r in known]
    low, high, source = interval(values, first, grades)
    before = [number(r.result(BEFORE, name).get("avg")) for r, _ in known]
    k = first.get("samples")
    return Final(
        group.label,
        name,
        100 * _mean(before),
        100 * _mean(values),
        100 * low,
        100 * high,
        source,
        100 * group.teacher_accuracy(name),
        k if isinstance(k, int) else None,
        100 * _mean([number(r.get("best")) for _, r in known]),
        _mean([number(r.get("length")) for _, r in known]),
        100 * _mean([number(r.get("truncated")) for _, r in known]),
    )


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return statistics.fmean(known) if known else math.nan


def training_seconds(run: Run) -> float:
    """Return the seconds of a run's steps; NaN if they were not recorded."""
    return float(run.seconds[-1]) if len(run.seconds) and run.seconds[-1] > 0 else math.nan


def differing_settings(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between groups: (name, the value of each group)."""
    known = [compared_settings(g.runs[0]) for g in groups]
    names = dict.fromkeys(name for settings in known for name in settings)
    rows = []
    for name in names:
        values = [_shown(s[name]) if name in s else "(not there)" for s in known]
        if len(set(values)) > 1 and any(known):
            rows.append((name, values))
    return sorted(rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def finals(collection: Collection, samples: Mapping[str, list[Problem]]) -> dict[str, list[Final]]:
    """Return the final results by set, the headline first."""
    names = sorted(collection.sets(), key=lambda n: n != collection.headline)
    found = {n: [f for g in collection.groups if (f := final(g, n, samples))] for n in names}
    return {name: rows for name, rows in found.items() if rows}
