"""The page of ``oprd-paper``'s report: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from oprd.paper.measures import Results
from oprd.paper.questions import SECTIONS
from oprd.paper.tables import beside
from oprd.paper.verdict import NOT_SAME, SAME, UNDECIDED, Answer
from oprd.report import page as shared
from oprd.report.chart import Chart
from oprd.report.on_page import figure
from oprd_kernels._version import __version__

GENERATOR = "oprd-paper"
TITLE = "The OPRD paper in miniature"
HERE = Path(__file__).parent
MARKS = {SAME: "same", NOT_SAME: "other", UNDECIDED: "open"}
"""By verdict, the class of its mark; of all others "none"."""


def page(
    results: Results,
    answers: Sequence[Answer],
    charts: Sequence[Chart],
    about: Sequence[tuple[str, str]],
) -> str:
    """Return the page's HTML.

    Args:
        about: how the results were made, as (name, value).
    """
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, shared.HERE]),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    drawn = {chart.key: figure(chart) for chart in charts}
    sections = [
        {
            "key": s.key, "place": s.place, "title": s.title, "about": s.about,
            "answers": [a for a in answers if a.section == s.key],
            "table": beside(results, s),
            "charts": [
                shared.chart_values(c, drawn[c.key]["layout"]["height"], pngs=True)
                for c in charts
                if c.section == s.key
            ],
        }
        for s in SECTIONS
    ]  # fmt: skip
    values: Mapping[str, Any] = {
        "generator": GENERATOR,
        "title": TITLE,
        "version": __version__,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        "css": Markup((shared.HERE / "page.css").read_text()),
        "js": Markup((shared.HERE / "page.js").read_text()),
        "plotly": Markup(get_plotlyjs()),
        "figures": shared.figures_data(drawn),
        "about": about,
        "answers": answers,
        "counts": _counts(answers),
        "sections": sections,
        "mark": lambda verdict: MARKS.get(verdict, "none"),
    }
    return env.get_template("paper.html.j2").render(values)


def _counts(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    """Return the number of answers by verdict, the paper's order first."""
    verdicts = [a.verdict for a in answers]
    names = dict.fromkeys([*MARKS, *verdicts])
    return [(name, verdicts.count(name)) for name in names if name in verdicts]
