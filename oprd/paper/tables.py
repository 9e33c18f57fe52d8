"""The tables of ``oprd-paper``'s report: the paper's numbers beside ours, and all answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oprd.benchmark.report import markdown_table
from oprd.paper.measures import Measure, Results, of_set
from oprd.paper.question import Section
from oprd.paper.verdict import Answer, figures, known_values, spread_of

HEADS = ("question", "paper", "ours", "verdict")


@dataclass(frozen=True)
class Beside:
    """A table with the paper's numbers beside ours.

    Attributes:
        groups: (name, number of columns) of the columns behind the row's name.
        heads: of all columns, the row's name first.
        rows: the cells.
    """

    groups: tuple[tuple[str, int], ...]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def starts(self) -> list[int]:
        """The index of the first column of each group."""
        counts = [count for _, count in self.groups]
        return [1 + sum(counts[:i]) for i in range(len(counts))]

    def markdown(self) -> str:
        """Return the table as Markdown; its heads say whose the numbers are."""
        whose = [name for name, count in self.groups for _ in range(count)]
        heads = [f"{w}: {h}" if w else h for w, h in zip(["", *whose], self.heads, strict=True)]
        return "\n".join(markdown_table(heads, _escaped(self.rows)))


def beside(results: Results, section: Section) -> Beside | None:
    """Return a section's table: a row for each of its rows that was run or is in the paper."""
    measures: list[Measure] = [of_set(n) for n in results.sets] if section.by_set else []
    measures += section.measures
    runs = [run for name in section.rows for run in results.runs(name).values()]
    measures = [measure.among(runs) for measure in measures]
    paper = section.paper
    known = [n for n in section.rows if results.runs(n) or (paper and n in paper.rows)]
    if not known:
        return None
    rows = []
    for name in known:
        theirs = paper.rows.get(name, (None,) * len(paper.columns)) if paper else ()
        cells = [_paper(value) for value in theirs]
        cells += [_ours(results, measure, name) for measure in measures]
        rows.append((results.name(name), *cells))
    heads = [f"{measure.name}, {measure.unit}".rstrip(", ") for measure in measures]
    columns = paper.columns if paper else ()
    groups = [("paper", len(columns))] if columns else []
    return Beside((*groups, ("ours", len(heads))), ("row", *columns, *heads), tuple(rows))


def _paper(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ours(results: Results, measure: Measure, name: str) -> str:
    runs, known = results.runs(name), known_values(results, measure, name)
    found = spread_of(results, measure, name)
    if found is None:
        return "not run" if not runs else "not reached" if measure.least else "-"
    cell = " ± ".join(figures([v for v in found if v is not None], measure.unit))
    return cell if len(known) == len(runs) else f"{cell} ({len(known)} of {len(runs)} seeds)"


def summary(answers: Sequence[Answer], brief: bool = False) -> str:
    """Return all answers as a Markdown table: question, paper, ours, verdict.

    Args:
        brief: whether to leave out the differences and their intervals where values are given.
    """
    rows = []
    for a in answers:
        texts = [d.text() for d in a.differences if d.mean is not None]
        parts = [a.ours] if brief and a.ours else [a.ours, "; ".join(texts)]
        ours = ". ".join(part for part in parts if part)
        note = f" ({a.note})" if a.note else ""
        rows.append((f"{a.place}: {a.question}", a.paper, ours or "-", f"{a.verdict}{note}"))
    heads, _, *lines = markdown_table(HEADS, _escaped(rows))
    return "\n".join([heads, "|---" * len(HEADS) + "|", *lines])  # words: on the left


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the cells with bars that do not end them."""
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]
