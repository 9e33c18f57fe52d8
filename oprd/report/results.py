"""Final results of groups: accuracy with 95 % intervals, and the settings that differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oprd.report.collect import Collection, Group, compared_settings
from oprd.report.intervals import interval
from oprd.report.read import number
from oprd.report.run import AFTER, BEFORE, Run
from oprd.report.samples import Problem, problem_grades


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
