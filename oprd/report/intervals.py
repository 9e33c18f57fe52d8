"""95 % intervals of accuracies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from oprd.report.chart import short
from oprd.report.read import number

Z = 1.96
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, .. 30 degrees of freedom."""


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
    without_spread = error == 0 and share in (0, 1)  # no mistake yet is not: none ever
    if (one_sample or without_spread) and count > 0:
        return *wilson(share, count), f"{short(count)} problems (Wilson)"
    if error >= 0:
        over = f"{short(count)} problems" if count > 0 else "problems"
        low, high = max(share - Z * error, 0.0), min(share + Z * error, 1.0)
        return low, high, f"{over} (standard error)"
    return math.nan, math.nan, "unknown: one seed, and no record of the problems"
