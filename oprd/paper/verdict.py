"""The answers to the questions: differences between rows with 95 % intervals, and verdicts.

With two or more seeds, rows are compared seed by seed, and the interval of the mean is Student's.
With one seed it is over the problems: paired where the grades of each problem are kept, else from
both standard errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from oprd.evaluation.metrics import over_sets, paired, t_quantile
from oprd.paper.measures import MODELS, Measure, Results, Run
from oprd.paper.question import REFUSED, Claim, Question, Section
from oprd.paper.questions import SECTIONS
from oprd.report.chart import short
from oprd.report.intervals import Z

SAME = "same order"
NOT_SAME = "not the same"
UNDECIDED = "not decided"
NOT_RUN = REFUSED
OURS_ONLY = "ours only"
"""There is no order of the paper to agree with."""


@dataclass(frozen=True)
class Difference:
    """The sum that a claim is about.

    Attributes:
        mean: None if it can't be told; ``note`` says why.
        low, high: 95 % interval; None if there is none.
        over: what the interval is over, or why there is none.
        sign: 1 if the sum is above 0, -1 if it is below, 0 if that is not decided.
        missing: names of the rows that were not run.
    """

    label: str
    unit: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    over: str = ""
    sign: int = 0
    missing: tuple[str, ...] = ()
    note: str = ""

    def text(self) -> str:
        """Return the difference in words."""
        if self.mean is None:
            return f"{self.label}: {self.note}"
        unit = f" {self.unit}" if self.unit else ""
        known = [v for v in (self.mean, self.low, self.high) if v is not None]
        mean, *ends = figures(known, self.unit)
        span = f" ({' to '.join(ends)})" if ends else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.label}: {'+' if self.mean > 0 else ''}{mean}{unit}{span}{note}"


@dataclass(frozen=True)
class Answer:
    """A question with the paper's answer, ours and the verdict.

    Attributes:
        key: the question's key; section: that of its section.
        place: table or figure of the paper, or the section's title.
        ours: our values in words.
        differences: what the verdict rests on.
        note: why it is not answered, or what is missing.
    """

    key: str
    section: str
    place: str
    question: str
    paper: str
    ours: str
    verdict: str
    differences: tuple[Difference, ...] = ()
    note: str = ""


def figures(values: Sequence[float], unit: str) -> list[str]:
    """Format numbers for reading, with as many decimals as the largest needs for three digits."""
    largest = max(map(abs, values))
    decimals = 2 - math.floor(math.log10(largest)) if largest > 0 else 0
    if unit in ("%", "points"):
        decimals = 1 if largest >= 1 else 2
    return [f"{value:,.{max(decimals, 0)}f}" for value in values]


def answers(results: Results) -> list[Answer]:
    """Answer all questions, in the order of `SECTIONS`."""
    return [answer(results, s, q) for s in SECTIONS for q in s.questions]


def answer(results: Results, section: Section, question: Question) -> Answer:
    """Answer a question from the runs that there are."""
    place = section.place or section.title
    about = (question.key, section.key, place, question.text, question.paper)
    if question.unasked is not None:
        verdict, reason = question.unasked
        vocabulary = results.values.get("vocabulary", "few")
        return Answer(*about, "", verdict, note=reason.format(vocabulary=vocabulary))
    differences = tuple(difference(results, claim) for claim in question.claims)
    if len({claim.measure.name for claim in question.claims}) > 1:
        pairs = zip(differences, question.claims, strict=True)
        differences = tuple(replace(d, label=f"{d.label}, {c.measure.name}") for d, c in pairs)
    verdict = _verdict(question, differences)
    missing = list(dict.fromkeys(name for d in differences for name in d.missing))
    notes = [f"no run of {'; '.join(missing)}"] if missing else []
    notes += [d.text() for d in differences if d.mean is None and not d.missing]
    ours = "" if verdict == NOT_RUN else _values(results, question)
    if verdict == OURS_ONLY:
        ours = ". ".join(part for part in (_in_words(differences), ours) if part)
    return Answer(*about, ours, verdict, differences, "; ".join(notes))


def _in_words(differences: Sequence[Difference]) -> str:
    """Return what our numbers say to a question by themselves."""
    signs = {d.sign for d in differences if d.mean is not None}
    if signs in ({1}, {-1}):
        return "Yes" if 1 in signs else "No"
    if signs == {0}:
        return "Not decided"
    return "In part" if 1 in signs else "No, in part"


def _verdict(question: Question, differences: Sequence[Difference]) -> str:
    known = [d for d in differences if d.mean is not None]
    if not known:
        return NOT_RUN if all(d.missing for d in differences) else UNDECIDED
    if not question.has_order:
        return OURS_ONLY
    if any(d.sign < 0 for d in known):
        return NOT_SAME
    return SAME if all(d.sign > 0 for d in differences) else UNDECIDED


def _values(results: Results, question: Question) -> str:
    """Return the values of the compared rows in words, where they are all of one measure.

    Nothing is returned of a measure that some seeds don't reach, whose mean would leave them out.
    """
    first = question.claims[0].measure
    if first.least or any(
        c.measure.name != first.name or len(c.terms) < 2 for c in question.claims
    ):
        return ""
    names = list(dict.fromkeys(name for claim in question.claims for name, _ in claim.terms))
    measure = _among(results, first, names)
    parts = []
    for name in names:
        if found := known_values(results, measure, name):
            (mean,) = figures([statistics.fmean(found)], first.unit)
            parts.append(f"{results.name(name)}: {mean}")
    return f"{'; '.join(parts)} {first.unit}".strip() if parts else ""


def _among(results: Results, measure: Measure, names: Sequence[str]) -> Measure:
    return measure.among(run for name in names for run in results.runs(name).values())


def known_values(results: Results, measure: Measure, name: str) -> list[float]:
    """Return a measure's values over the seeds of a row that have it."""
    values = (measure.value(run) for run in results.runs(name).values())
    return [v for v in values if v is not None]


def spread_of(results: Results, measure: Measure, name: str) -> tuple[float, float | None] | None:
    """Return a row's mean and the half width of its 95 % interval, None where it is not known."""
    values = known_values(results, measure, name)
    if not values:
        return None
    if len(values) > 1:
        return statistics.fmean(values), _half(values)
    errors = [measure.standard_error(run) for run in results.runs(name).values()]
    return values[0], None if errors[0] is None else Z * errors[0]


def _half(values: Sequence[float]) -> float:
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def label(results: Results, claim: Claim) -> str:
    """Return the sum of a claim in words."""
    if claim.label:
        return claim.label
    parts = [("" if factor > 0 else "minus ") + results.name(name) for name, factor in claim.terms]
    return " ".join(parts)


def difference(results: Results, claim: Claim) -> Difference:
    """Return the sum that a claim is about, over the seeds that all its rows have."""
    names = [name for name, _ in claim.terms]
    words, unit = label(results, claim), claim.measure.difference_unit
    if missing := tuple(results.name(name) for name in names if not results.runs(name)):
        return Difference(words, unit, missing=missing, note="not run")
    measure = _among(results, claim.measure, names)
    values, note, by_seed = [], "", []
    for runs in _by_seed(results, names):
        value, bound = _sum(claim, measure, runs)
        if value is None:
            unknown = [n for n, r in zip(names, runs, strict=True) if measure.value(r) is None]
            what = "not reached by" if measure.least else "not measured for"
            rows = "; ".join(results.name(name) for name in dict.fromkeys(unknown))
            return Difference(words, unit, note=f"{what} {rows}")
        values.append(value)
        by_seed.append(runs)
        note = "or more: not all runs reached it" if bound else note
    if not values:
        return Difference(words, unit, note="no seed in common")
    mean = statistics.fmean(values)
    if claim.exact:
        sign = 1 if min(values) > 0 else -1 if max(values) < 0 else 0
        return Difference(words, unit, mean, over="exact, in every run", sign=sign, note=note)
    half, over = _interval(claim, measure, values, by_seed[0])
    if half is None:
        return Difference(words, unit, mean, over=over, note=note or over)
    low, high = mean - half, mean + half
    sign = 1 if low > 0 else -1 if high < 0 else 0
    return Difference(words, unit, mean, low, high, over, sign, note=note)


def _by_seed(results: Results, names: Sequence[str]) -> Iterator[list[Run]]:
    """Yield the runs of all rows for each seed that they share; models have no seeds."""
    trained = [name for name in dict.fromkeys(names) if name not in MODELS]
    seeds = [set(results.runs(name)) for name in trained]
    for seed in sorted(set.intersection(*seeds), key=lambda s: s or 0) if seeds else [None]:
        yield [results.runs(name)[None if name in MODELS else seed] for name in names]


def _sum(claim: Claim, measure: Measure, runs: Sequence[Run]) -> tuple[float | None, bool]:
    """Return a claim's sum for one seed, and whether it is a bound towards its own sign."""
    total, unknown = 0.0, []
    for (_, factor), run in zip(claim.terms, runs, strict=True):
        value = measure.value(run)
        if value is None:
            value = measure.lower_bound(run)
            unknown.append(factor)
        if value is None:
            return None, False
        total += factor * value
    if not unknown:
        return total, False
    is_bound = len(unknown) == 1 and unknown[0] * total > 0
    return (total, True) if is_bound else (None, False)


def _interval(
    claim: Claim, measure: Measure, values: Sequence[float], first: Sequence[Run]
) -> tuple[float | None, str]:
    """Return the half width of a sum's 95 % interval and what it is over, or None and why."""
    if len(values) > 1:
        if max(values) - min(values) <= 1e-9 * max(map(abs, values)):
            return None, f"{len(values)} seeds with the same difference: no interval"
        once = _error_of_models(claim, measure, first)
        over = f"{len(values)} seeds (Student's t)"
        if once:
            over += ", and the problems of the model that is not trained"
        return math.hypot(_half(values), Z * once), over
    if (found := _over_problems(claim, measure, first)) is not None:
        return found
    errors = [measure.standard_error(run) for run in first]
    known = [e for e in errors if e is not None]
    if known and len(known) == len(errors) and any(known):
        factors = [factor for _, factor in claim.terms]
        variance = sum((f * e) ** 2 for f, e in zip(factors, known, strict=True))
        return Z * math.sqrt(variance), "one seed: problems, not paired"
    return None, "one seed: no interval"


def _error_of_models(claim: Claim, measure: Measure, runs: Sequence[Run]) -> float:
    """Return the standard error of a claim's untrained models, which are evaluated once for all
    seeds; 0 where it is not known."""
    squares = 0.0
    for (name, factor), run in zip(claim.terms, runs, strict=True):
        if name in MODELS:
            squares += (factor * (measure.standard_error(run) or 0.0)) ** 2
    return math.sqrt(squares)


def _over_problems(claim: Claim, measure: Measure, runs: Sequence[Run]) -> tuple[float, str] | None:
    """Return the interval's half width over paired problems; None without grades of all runs."""
    if measure.grades is None:
        return None
    grades = [measure.grades(run) for run in runs]
    sets = list(dict.fromkeys(name for by_set in grades for name in by_set))
    found = []
    for name in sets:
        own = [by_set.get(name, ()) for by_set in grades]
        count = len(own[0])
        if count < 2 or any(len(g) != count for g in own):
            return None
        factors = [factor for _, factor in claim.terms]
        sums = [sum(f * g[i] for f, g in zip(factors, own, strict=True)) for i in range(count)]
        zeros = dict.fromkeys(range(count), 0.0)
        names = {"baseline": "", "model": ""}
        found.append(vars(paired(zeros, dict(enumerate(sums)))) | names)
    if not found:
        return None
    mean = over_sets(found)
    half = measure.scale * (mean["high"] - mean["mean"])
    if half == 0:
        return None
    return half, f"{short(mean['problems'])} problems, paired; one seed"
