"""What a question of ``oprd-paper`` consists of, and the claims that most of them make."""

from __future__ import annotations

from dataclasses import dataclass

from oprd.paper import measures as m
from oprd.paper.measures import Measure

TOO_SMALL = "can't be asked at this size"
REFUSED = "not run"
NOT_KNOWN = "its numbers are not at hand"


@dataclass(frozen=True)
class Claim:
    """That a sum of a measure over rows is above 0.

    Attributes:
        terms: (id of a row or of a model, factor).
        measure: what is compared.
        label: the sum in words; empty: made of the rows' names.
        exact: whether the sum is exact, so that its sign in every run decides, with no interval.
    """

    terms: tuple[tuple[str, float], ...]
    measure: Measure
    label: str = ""
    exact: bool = False


@dataclass(frozen=True)
class Question:
    """A question with the paper's answer.

    Attributes:
        key: its anchor on the page.
        paper: the paper's answer in words and numbers.
        claims: together, the paper's answer; or, of a question without one, what is compared.
        has_order: whether the paper gives an answer, so that ours can agree with it.
        unasked: (verdict, reason) of a question that is not answered here.
    """

    key: str
    text: str
    paper: str
    claims: tuple[Claim, ...] = ()
    has_order: bool = True
    unasked: tuple[str, str] | None = None


@dataclass(frozen=True)
class PaperNumbers:
    """Numbers of the paper beside our rows.

    Attributes:
        columns: heads, with units.
        rows: by the id of our row, the cells.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[float | str | None, ...]]


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, or a group of further questions.

    Attributes:
        place: where it stands in the paper; empty: it does not.
        about: how it was done here, and what differs from the paper.
        rows: ids of the rows and models of its table, in order.
        measures: the columns of its table; before them, ``by_set`` adds one for each set.
    """

    key: str
    place: str
    title: str
    about: str
    questions: tuple[Question, ...]
    rows: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()
    paper: PaperNumbers | None = None
    by_set: bool = False


def above(higher: str, lower: str, measure: Measure) -> Claim:
    """Return the claim that one row is above another."""
    return Claim(((higher, 1.0), (lower, -1.0)), measure)


def within(row: str, measure: Measure, label: str) -> Claim:
    """Return the claim that a difference within each run of a row is above 0."""
    return Claim(((row, 1.0),), measure, label)


def gains_more(row: str, other: str) -> Claim:
    """Return the claim that a row gains more by four times as many rollouts than another does."""
    terms = ((f"{row}_x4", 1.0), (row, -1.0), (f"{other}_x4", -1.0), (other, 1.0))
    names = {"opd_top1": "OPD top-1", "opd_full": "OPD full", "oprd": "OPRD"}
    return Claim(terms, m.ACCURACY, f"gain of {names[row]} minus gain of {names[other]}")


OPD = ("opd_top1", "opd_top4", "opd_full", "opd_forward", "opd_jsd")
MAIN = (*OPD, "oprd")
