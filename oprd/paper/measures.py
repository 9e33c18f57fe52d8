"""The numbers that the questions of ``oprd-paper`` ask for, read from ``results.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from oprd.paper.recipe import recipe

Run = Mapping[str, Any]
"""A run of ``results.json`` with what all runs of its row share; see `Results.runs`."""
STUDENT = "student"
VAL = "val"
K = 16
"""Tokens of the first and of the last ones that are compared, about a quarter of a response."""
LAST_PART = 4
"""The end of a logged metric is the mean of this part of its values, the last quarter."""
MODELS = {
    STUDENT: "student before",
    "teacher": "teacher",
    "teacher_of_other_shape": "teacher of another shape",
    "teacher_of_other_tokenizer": "teacher with another tokenizer",
}
"""Names of the models that are not trained, by their ids in ``results.json``."""


class Results:
    """``results.json``: its runs by row and seed. Rows, seeds and values may be missing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.sets: list[str] = list(values.get("sets") or [])
        self.models: dict[str, Any] = values.get("models") or {}
        self.rows: dict[str, Any] = {row["id"]: row for row in values.get("rows") or []}

    def runs(self, name: str) -> dict[int | None, Run]:
        """Return the runs of a row by seed; of a model that is not trained, one with seed None.

        To a run's own values are added "sets", "steps", "rollouts" and "teacher" (the teacher's
        results by set).
        """
        if name in MODELS:
            if name not in self.models:
                return {}
            start = self.values.get("start") if name == STUDENT else None
            return {None: {"results": self.models[name], "measured": start, "sets": self.sets}}
        row = self.rows.get(name)
        if row is None:
            return {}
        shared = {
            "sets": self.sets,
            "steps": row["steps"],
            "rollouts": row["rollouts"],
            "teacher": self.models.get(row["teacher"], {}),
        }
        return {run["seed"]: {**run, **shared} for run in row["runs"]}

    def name(self, name: str) -> str:
        """Return the name of a row or model for readers, also of a row that was not run."""
        if name in MODELS:
            return MODELS[name]
        if name in self.rows:
            return str(self.rows[name]["name"])
        known = recipe().rows
        return known[name].name if name in known else name

    def seeds(self) -> list[int]:
        """Return the seeds of all runs, in order."""
        return sorted({run["seed"] for row in self.rows.values() for run in row["runs"]})


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        name: the head of its column.
        unit: unit of its values.
        read: reads it; None where a run does not have it.
        scale: factor from what is read to ``unit``.
        error: reads its standard error over problems, before ``scale``.
        grades: reads the grades of each problem by set, whose mean over problems and then sets it
            is, before ``scale``.
        least: reads a lower bound of a value that `read` does not know.
    """

    name: str
    unit: str
    read: Callable[[Run], float | None]
    scale: float = 1.0
    error: Callable[[Run], float | None] | None = None
    grades: Callable[[Run], dict[str, Sequence[float]]] | None = None
    least: Callable[[Run], float | None] | None = None

    def value(self, run: Run) -> float | None:
        """Return the number in ``unit``, None where a run does not have it."""
        return self._scaled(self.read(run))

    def standard_error(self, run: Run) -> float | None:
        """Return the standard error over problems in ``unit``, None if it is not known."""
        return self._scaled(self.error(run)) if self.error else None

    def lower_bound(self, run: Run) -> float | None:
        """Return a lower bound in ``unit``, None if there is none."""
        return self._scaled(self.least(run)) if self.least else None

    def among(self, runs: Iterable[Run]) -> Measure:
        """Return the measure for a comparison of these runs."""
        return self

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two values."""
        return "points" if self.unit == "%" else self.unit

    def _scaled(self, value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else value * self.scale


@dataclass(frozen=True)
class AtEqualSeconds(Measure):
    """Accuracy on the validation set when the first of the compared runs has ended.

    The curve of each run is interpolated at the smallest of the runs' total training seconds. The
    standard error is that of a share of as many independent responses as there are problems, an
    upper bound.
    """

    def among(self, runs: Iterable[Run]) -> Measure:
        ends = [curve(run)[-1][1] for run in runs if len(curve(run)) > 1]
        if not ends:
            return self
        return replace(
            self,
            read=lambda run: accuracy_at(curve(run), min(ends)),
            error=lambda run: _error_at(run, min(ends)),
        )


def curve(run: Run) -> list[list[float]]:
    """Return a run's validation curve, [step, training seconds, accuracy (0..1)] a point."""
    return run.get("curve") or []


def accuracy_at(points: Sequence[Sequence[float]], seconds: float) -> float | None:
    """Return the accuracy of a curve after some seconds, by linear interpolation; None of an empty
    curve, or after its end."""
    for before, after in pairwise(points):
        if before[1] <= seconds <= after[1]:
            part = (seconds - before[1]) / (after[1] - before[1] or 1.0)
            return before[2] + part * (after[2] - before[2])
    return None


def rollouts_to(run: Run, share: float) -> float | None:
    """Return the rollouts after which the validation curve first has come ``share`` of the way
    from the student to the teacher, by linear interpolation; None if it never does."""
    points, teacher = curve(run), _eval(run.get("teacher"), VAL, "avg")
    if teacher is None or not points:
        return None
    goal = points[0][2] + share * (teacher - points[0][2])
    for before, after in pairwise(points):
        if after[2] >= goal:
            rise = after[2] - before[2]
            part = (goal - before[2]) / rise if rise > 0 else 1.0
            return (before[0] + part * (after[0] - before[0])) * run["rollouts"]
    return None


def _all_rollouts(run: Run) -> float | None:
    points = curve(run)
    return points[-1][0] * run["rollouts"] if len(points) > 1 else None


def _error_at(run: Run, seconds: float) -> float | None:
    share = accuracy_at(curve(run), seconds)
    problems = _eval(run["results"], VAL, "problems")
    return math.sqrt(share * (1 - share) / problems) if share is not None and problems else None


def _eval(results: Any, name: str, key: str) -> float | None:
    return ((results or {}).get(name) or {}).get(key)


def _mean_of_sets(key: str) -> Callable[[Run], float | None]:
    def read(run: Run) -> float | None:
        values = [_eval(run["results"], name, key) for name in run["sets"]]
        known = [v for v in values if v is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    return read


def _error_of_sets(run: Run) -> float | None:
    errors = [_eval(run["results"], name, "stderr") for name in run["sets"]]
    known = [e for e in errors if e is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(e * e for e in known)) / len(known)


def _grades_of_sets(run: Run) -> dict[str, Sequence[float]]:
    grades = run.get("grades") or {}
    return {n: grades[n] for n in run["sets"] if grades.get(n)}


def of_set(name: str) -> Measure:
    """Return the accuracy (Avg@k) on one set."""
    return Measure(
        name.replace("_", " "),
        "%",
        lambda run: _eval(run["results"], name, "avg"),
        100,
        lambda run: _eval(run["results"], name, "stderr"),
    )


def measured(name: str, unit: str, *path: str, scale: float = 1.0) -> Measure:
    """Return a number of what was measured on held-out rollouts after the training."""

    def read(run: Run) -> float | None:
        value: Any = run.get("measured")
        for key in path:
            value = (value or {}).get(key)
        return value

    return Measure(name, unit, read, scale)


def at_end(name: str, unit: str, metric: str, scale: float = 1.0) -> Measure:
    """Return the mean of the last quarter of what a run logged of a metric."""

    def read(run: Run) -> float | None:
        values = [v for _, v in (run.get("logged") or {}).get(metric) or ()]
        return statistics.fmean(values[-max(1, len(values) // LAST_PART) :]) if values else None

    return Measure(name, unit, read, scale)


def phase(name: str) -> Measure:
    """Return the seconds a step of one phase."""
    return Measure(name, "s", lambda run: _a_step(run, [name]))


def _a_step(run: Run, phases: Iterable[str]) -> float | None:
    seconds = [(run.get("seconds") or {}).get(name) for name in phases]
    known = [s for s in seconds if s is not None]
    return sum(known) / run["steps"] if known and run.get("steps") else None


def _curve_mean(run: Run) -> float | None:
    points = curve(run)
    if len(points) < 2:
        return None
    area = sum((b[0] - a[0]) * (a[2] + b[2]) / 2 for a, b in pairwise(points))
    return area / (points[-1][0] - points[0][0])


def _cosine_of_ends(pick: Callable[[float, float], float]) -> Callable[[Run], float | None]:
    """Return a reader of the cosines of the last layer over the first and the last `K` tokens."""

    def read(run: Run) -> float | None:
        found = run.get("measured") or {}
        first, last = (dict(found.get(f"cosine_{end}_k") or ()) for end in ("first", "last"))
        return pick(first[K], last[K]) if K in first and K in last else None

    return read


def _variance_of_opd_alone(run: Run) -> float | None:
    """Return OPD top-1's variance where OPRD's is exactly 0, else OPRD's below 0."""
    opd, oprd = TOP1_VARIANCE.value(run), OPRD_VARIANCE.value(run)
    return None if opd is None or oprd is None else opd if oprd == 0 else -oprd


def rollouts(share: float) -> Measure:
    """Return the rollouts needed to come ``share`` of the way from student to teacher."""
    return Measure(
        f"to {100 * share:.0f} % of the way",
        "rollouts",
        lambda run: rollouts_to(run, share),
        least=_all_rollouts,
    )


ACCURACY = Measure("mean of sets", "%", _mean_of_sets("avg"), 100, _error_of_sets, _grades_of_sets)
BEST = Measure("Best@k", "%", _mean_of_sets("best"), 100)
DISTINCT = Measure("Dist-4g", "%", _mean_of_sets("dist_4g"))
LENGTH = Measure("length", "tokens", _mean_of_sets("length"))
STEP = Measure("a step", "s", lambda run: _a_step(run, run.get("seconds") or ()))
SECONDS = Measure(
    "training", "s", lambda run: sum(run["seconds"].values()) if run.get("seconds") else None
)
TOKENS_PER_SECOND = Measure("throughput", "tokens/s", lambda run: run.get("tokens_per_second"))
CURVE = Measure("mean of the curve", "%", _curve_mean, 100)
EQUAL_SECONDS = AtEqualSeconds("at equal seconds", "%", lambda run: None, 100)
END_OF_CURVE = Measure(
    "on val, at the end", "%", lambda run: _eval(run["results"], VAL, "avg"), 100
)
COSINE = measured("cosine, all layers", "%", "cosine", scale=100)
LAST_COSINE = measured("cosine, last layer", "%", "cosine_last_layer", scale=100)
COSINE_FIRST = Measure(f"first {K}", "%", _cosine_of_ends(lambda first, _: first), 100)
COSINE_LAST = Measure(f"last {K}", "%", _cosine_of_ends(lambda _, last: last), 100)
COSINE_GAP = Measure(f"first {K} minus last {K}", "%", _cosine_of_ends(lambda a, b: a - b), 100)
KL = measured("KL to the teacher", "nats", "kl")
OVERLAP = measured("top-4 overlap", "%", "overlap", scale=100)
ENTROPY = measured("student's entropy", "nats", "entropy")
TEACHER_ENTROPY = measured("teacher's entropy", "nats", "teacher_entropy")
BRIDGED_COSINE = at_end("projected cosine", "%", "rep/cosine_similarity", scale=100)
ROLLOUT_LENGTH = at_end("rollouts at the end", "tokens", "response_length/mean")
TOP1_VARIANCE = measured("variance, OPD top-1", "", "token_variance", "top1")
OPRD_VARIANCE = measured("variance, OPRD", "", "token_variance", "oprd")
VARIANCE_OF_OPD_ALONE = Measure("variance", "", _variance_of_opd_alone)
SIGNAL = measured("squared mean, OPD top-1", "", "token_variance", "mean_square")
TOP1_SNR = measured("SNR, OPD top-1", "", "snr", "opd_top1")
FULL_SNR = measured("SNR, OPD full", "", "snr", "opd_full")
OPRD_SNR = measured("SNR, OPRD", "", "snr", "oprd")


def minus(first: Measure, second: Measure, name: str) -> Measure:
    """Return the difference of two measures of the same run."""

    def read(run: Run) -> float | None:
        ours, theirs = first.value(run), second.value(run)
        return None if ours is None or theirs is None else ours - theirs

    return Measure(name, first.unit, read)
