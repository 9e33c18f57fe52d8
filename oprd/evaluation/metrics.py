"""Statistics of graded responses, and of the difference between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan2, comb, cos, pi, sin, sqrt
from statistics import fmean, stdev
from typing import Any

from oprd.observability.summary import EvalResult


@dataclass(frozen=True)
class Scored:
    """The k responses to one problem.

    Attributes:
        right: whether each is right; None: there is no reference answer.
        lengths: number of tokens of each, including EOS.
        truncated: whether each ended without EOS.
        dist_4g: see `distinct_4grams`.
        boxed: whether each has a complete box; None: the grader needs none.
        ungraded: number of responses on which the grader gave no verdict.
    """

    right: list[bool] | None
    lengths: list[int]
    truncated: list[bool]
    dist_4g: float | None
    boxed: list[bool] | None = None
    ungraded: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right responses."""
        assert self.right is not None
        return sum(self.right) / len(self.right)


def distinct_4grams(responses: Sequence[str]) -> float | None:
    """Return Dist-4g: 100 * distinct 4-grams / all 4-grams, pooled over ``responses``.

    4-grams are of words separated by white space. Returns None if there are none.
    """
    texts = [response.split() for response in responses]
    grams = [tuple(words[i : i + 4]) for words in texts for i in range(len(words) - 3)]
    return 100 * len(set(grams)) / len(grams) if grams else None


def pass_at(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n responses (arXiv 2107.03374, Eq. 1).

    It is the chance that k of the n responses, drawn without replacement, contain a right one.
    """
    return 1 - comb(n - right, k) / comb(n, k)


def pass_all(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass^k: the chance that all of k responses are right."""
    return comb(right, k) / comb(n, k)


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k: powers of two from 2 on, and the number of samples."""
    return [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + (
        [samples] if samples > 1 else []
    )


def description(problems: Sequence[Scored]) -> dict[str, Any]:
    """Return the statistics that need no reference answers, under the names of `EvalResult`."""
    lengths = [n for p in problems for n in p.lengths]
    cut = [c for p in problems for c in p.truncated]
    distinct = [p.dist_4g for p in problems if p.dist_4g is not None]
    return {
        "dist_4g": fmean(distinct) if distinct else None,
        "length": fmean(lengths),
        "truncated": fmean(cut),
        "samples": len(problems[0].lengths),
        "problems": len(problems),
    }


def result(problems: Sequence[Scored]) -> EvalResult:
    """Return the statistics over problems with as many responses each."""
    right = [sum(p.right or ()) for p in problems]
    accuracies = [p.accuracy for p in problems]
    n = len(problems[0].lengths)
    boxed = [b for p in problems for b in p.boxed or ()]
    return EvalResult(
        avg=fmean(accuracies),
        best=fmean(c > 0 for c in right),
        stderr=stdev(accuracies) / sqrt(len(problems)) if len(problems) > 1 else None,
        pass_at={str(k): fmean(pass_at(n, c, k) for c in right) for k in sizes(n)},
        pass_all={str(k): fmean(pass_all(n, c, k) for c in right) for k in sizes(n)},
        unboxed=1 - fmean(boxed) if boxed else None,
        ungraded=sum(p.ungraded for p in problems),
        **description(problems),
    )


@dataclass(frozen=True)
class Difference:
    """The paired difference of two models' avg@k on the same problems, second minus first.

    Attributes:
        mean: the difference.
        low, high: its 95 % confidence interval, by Student's t over problems; None for a single
            problem.
        better, worse: number of problems on which the second model is better and worse.
        problems: number of problems.
    """

    mean: float
    low: float | None
    high: float | None
    better: int
    worse: int
    problems: int


def paired(first: Mapping[Any, float], second: Mapping[Any, float]) -> Difference:
    """Compare two models on the problems that both were evaluated on.

    Pairing removes the problems' own difficulty, most of the spread of each model alone.

    Args:
        first, second: accuracy by problem.

    Raises:
        ValueError: if they have no problem in common.
    """
    both = [key for key in first if key in second]
    if not both:
        raise ValueError("the two models have no problem in common")
    differences = [second[key] - first[key] for key in both]
    mean, n = fmean(differences), len(both)
    low = high = None
    if n > 1:
        half = t_quantile(n - 1) * stdev(differences) / sqrt(n)
        low, high = mean - half, mean + half
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(mean, low, high, better, worse, n)


def over_sets(differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of the differences on S sets. Its variance is the mean of theirs over S.

    Args:
        differences: of one model: the values of `Difference`, "baseline" and "model".
    """
    errors = [(d["high"] - d["mean"]) / t_quantile(d["problems"] - 1) for d in differences]
    mean, count = fmean(d["mean"] for d in differences), len(differences)
    problems = sum(d["problems"] for d in differences)
    half = t_quantile(problems - count) * sqrt(sum(e * e for e in errors)) / count
    sums = {name: sum(d[name] for d in differences) for name in ("better", "worse", "problems")}
    return {
        **{"set": "mean of sets", "baseline": differences[0]["baseline"]},
        **{"model": differences[0]["model"], "mean": mean, "low": mean - half, "high": mean + half},
        **sums,
    }


@lru_cache
def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Return t with P(|T| <= t) = ``confidence`` for Student's t distribution."""
    low, high = 0.0, 1e4
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if _within(t, freedom) < confidence else (low, t)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Return P(|T| <= t), Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = atan2(t, sqrt(freedom))
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cos(angle) ** 2 * (i - 1) / i
        total += term
    total *= sin(angle)
    return (angle + total) * 2 / pi if odd else total
