"""Models that were evaluated on the same problems, side by side: results, differences, charts."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oprd.evaluation.metrics import over_sets, paired
from oprd.report.chart import Chart, Interval, Intervals
from oprd.report.evals import UNGRADED, Evaluation, Model, Tally
from oprd.report.intervals import interval
from oprd.report.read import number

COMPARED = "Models compared"
"""Heading of the charts."""


@dataclass
class Board:
    """Models with as many samples of the same problems of a set, the first of them the baseline.

    Attributes:
        label: the set's name, unique in the report.
        name: the set's name.
        samples: number of samples a problem; None if it is not known.
        graded: whether the set has answers.
    """

    label: str
    name: str
    samples: int | None
    graded: bool
    models: list[Model]

    def tallies(self, model: Model) -> dict[int, Tally]:
        """Return a model's samples by problem."""
        return model.problems.get(self.name, {})

    def shares(self, model: Model) -> dict[int, float]:
        """Return the share of right samples by problem."""
        return {p: t.share for p, t in self.tallies(model).items() if UNGRADED not in t.verdicts}

    def result(self, model: Model) -> dict[str, Any]:
        """Return the model's results; what its samples tell, if ``results.json`` is missing."""
        if found := model.results.get(self.name):
            return found
        shares = list(self.shares(model).values())
        if not shares:
            return {}
        error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
        best = statistics.fmean(s > 0 for s in shares)
        own = {"avg": statistics.fmean(shares), "stderr": error, "best": best}
        return own | {"samples": self.samples, "problems": len(shares)}


def boards(evaluations: Sequence[Evaluation]) -> list[Board]:
    """Put models beside each other that have as many samples of the same problems.

    They may be of several evaluations. Problems are the same if set, numbers and answers are.
    """
    made: list[Board] = []
    homes: list[tuple[Board, str]] = []
    for evaluation in evaluations:
        for model in evaluation.models:
            for name in dict.fromkeys([*model.results, *model.problems]):
                board = _board(model, name)
                fitting = (b for b in made if b.name == name and _fits(b, board))
                if (same := next(fitting, None)) is not None:
                    same.models.append(model)
                else:
                    made.append(board)
                    homes.append((board, evaluation.directory.name))
    names = [b.name for b in made]
    for board, home in homes:
        if names.count(board.name) > 1:
            board.label = f"{board.name} ({home})"
    labels = [b.label for b in made]
    for i, board in enumerate(made):
        if labels.count(board.label) > 1:
            board.label += f" {labels[: i + 1].count(board.label)}"
    return made


def _board(model: Model, name: str) -> Board:
    result, tallies = model.results.get(name, {}), model.problems.get(name, {})
    samples = max((len(t.verdicts) for t in tallies.values()), default=result.get("samples"))
    graded = "avg" in result or any(UNGRADED not in t.verdicts for t in tallies.values())
    return Board(name, name, samples if isinstance(samples, int) else None, graded, [model])


def _fits(board: Board, other: Board) -> bool:
    """Return whether a board of one model has the same problems, and as many samples of each."""
    if (board.samples, board.graded) != (other.samples, other.graded):
        return False
    first, second = board.models[0], other.models[0]
    ours, theirs = board.tallies(first), other.tallies(second)
    if not ours or not theirs:
        return first.directory.parent == second.directory.parent
    return ours.keys() == theirs.keys() and all(
        tally.answer == theirs[problem].answer for problem, tally in ours.items()
    )


def name_apart(evaluations: Sequence[Evaluation]) -> None:
    """Add its evaluation's directory to a model's label that is not unique."""
    labels = [m.label for e in evaluations for m in e.models]
    count: dict[str, int] = {}
    for evaluation in evaluations:
        for model in evaluation.models:
            if labels.count(model.label) > 1:
                label = f"{model.label} ({evaluation.directory.name})"
                count[label] = count.get(label, 0) + 1
                model.label = label if count[label] == 1 else f"{label} {count[label]}"


def differences(found: Sequence[Board]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Compare every model with its board's baseline, problem by problem.

    Returns:
        By (baseline, model), the values of `oprd.evaluation.metrics.Difference` with "set",
        "baseline" and "model"; behind those of several sets, their mean.
    """
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for board in found:
        first, *others = board.models
        ours = board.shares(first)
        for model in others:
            theirs = board.shares(model)
            if ours.keys() & theirs.keys():
                own = {"set": board.label, "baseline": first.label, "model": model.label}
                values = own | vars(paired(ours, theirs))
                pairs.setdefault((first.label, model.label), []).append(values)
    for found_of in pairs.values():
        if len(found_of) > 1 and all(v["low"] is not None for v in found_of):
            found_of.append(over_sets(found_of))
    return pairs


def span(board: Board, model: Model) -> tuple[float, float, float, str]:
    """Return a model's accuracy and its 95 % interval, in percent, and what the interval is over;
    NaN where unknown."""
    result = board.result(model)
    value = number(result.get("avg"))
    low, high, source = interval([value], result, [])
    return 100 * value, 100 * low, 100 * high, source


def charts(found: Sequence[Board], first_group: int) -> list[Chart]:
    """Return the charts: accuracy by set, and differences by pair of models.

    Args:
        first_group: the first of the models' groups, which give colours and symbols.
    """
    models = dict.fromkeys(m.label for board in found for m in board.models)
    groups = {label: first_group + i for i, label in enumerate(models)}
    made: list[Chart] = []
    for board in found:
        items = []
        for model in board.models:
            value, low, high, _ = span(board, model)
            if math.isfinite(value):
                items.append(Interval(model.label, groups[model.label], value, low, high))
        if items:
            made.append(
                Intervals(
                    f"eval-{_slug(board.label)}", COMPARED, f"Accuracy on {board.label}",
                    f"accuracy (Avg@{board.samples or 'k'}, %)", "model",
                    "Share of right samples, with 95 % intervals over problems.", items=items,
                )
            )  # fmt: skip
    for (baseline, label), values in differences(found).items():
        items = [
            Interval(
                v["set"], groups[label], 100 * v["mean"],
                math.nan if v["low"] is None else 100 * v["low"],
                math.nan if v["high"] is None else 100 * v["high"],
            )
            for v in values
        ]  # fmt: skip
        made.append(
            Intervals(
                f"eval-difference-{_slug(label)}", COMPARED, f"{label} against {baseline}",
                "difference of accuracy (points)", "set",
                f"Right of the line, {label} is better. Problem by problem, with 95 % intervals: "
                "one that holds 0 may be chance.",
                items=items, references=[("no difference", 0.0)],
            )
        )  # fmt: skip
    return made


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "set"
