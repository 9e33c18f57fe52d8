"""The page: one HTML file with its styles, its script and its data, which loads nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from oprd.report import palette
from oprd.report.chart import BubbleChart, Chart, LineChart, StackedBars, short
from oprd.report.collect import Collection, Group
from oprd.report.evals_on_page import settings as eval_settings
from oprd.report.evals_on_page import tables
from oprd.report.figures import SECTIONS
from oprd.report.on_page import figure
from oprd.report.problems import views
from oprd.report.results import Final, differing_settings, training_seconds
from oprd.report.run import AFTER, BEFORE
from oprd.report.samples import Problem, choose
from oprd_kernels._version import __version__

GENERATOR = "oprd-report"
HERE = Path(__file__).parent
SHAPES = {
    "circle": '<circle cx="17" cy="7" r="4.2"/>',
    "square": '<rect x="13" y="3" width="8" height="8"/>',
    "diamond": '<path d="M17 1.8 22.2 7 17 12.2 11.8 7z"/>',
    "triangle-up": '<path d="M17 2 22 11H12z"/>',
    "x": '<path d="m12.5 4 1.5-1.5 3 3 3-3L21.5 4l-3 3 3 3-1.5 1.5-3-3-3 3L12.5 10l3-3z"/>',
    "cross": '<path d="M15.5 2.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z"/>',
    "star": '<path d="m17 1.5 1.6 3.7 4 .3-3 2.7.9 4L17 10.1l-3.5 2.1.9-4-3-2.7 4-.3z"/>',
    "pentagon": '<path d="m17 2 5 3.7-1.9 5.8h-6.2L12 5.7z"/>',
}


def page(
    collection: Collection,
    charts: Sequence[Chart],
    missing: Sequence[str],
    finals: Mapping[str, Sequence[Final]],
    samples: Mapping[str, list[Problem]],
    pngs: bool,
    watch: float | None = None,
) -> str:
    """Return the page's HTML.

    Args:
        missing: what the runs did not record, one message a figure.
        samples: by a run's directory, the problems whose responses were kept.
        pngs: whether charts link to the PNG files beside the page.
        watch: seconds after which the page reloads itself; None: never.
    """
    groups = collection.groups
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"fixed": _fixed, "signed": lambda x: f"{x:+.1f}" if x == x else "-"}
    labels = [g.label for g in groups]
    models = [m.label for e in collection.evals for m in e.models]
    problems = views(collection.boards)
    rollouts = [shown for i, g in enumerate(groups) if (shown := _rollouts(i, g, samples))]
    notes = [("", n) for n in collection.notes]
    notes += [(str(directory), n) for directory, n in collection.remarks]
    drawn = {c.key: figure(c) for c in charts}
    sections = [
        (
            _slug(name),
            name,
            [
                chart_values(c, drawn[c.key]["layout"]["height"], pngs)
                for c in charts
                if c.section == name
            ],
        )
        for name in SECTIONS
        if any(c.section == name for c in charts)
    ]
    settings = differing_settings(groups) if len(groups) > 1 else []
    optional: list[tuple[str, str, Any]] = [("results", "Final results", finals)]
    contents = [("notes", "What could not be read")] if notes else []
    contents += [("runs", "Runs")] if groups or not models else []
    optional.append(("evaluations", "Evaluations", models))
    contents += [(i, n) for i, n, there in optional if there]
    contents += [(slug, name) for slug, name, _ in sections]
    after: list[tuple[str, str, Any]] = [("settings", "Settings that differ", settings)]
    after += [("problems", "Problem by problem", problems)]
    after += [("rollouts", "Responses before and after", rollouts)]
    after += [("missing", "Not recorded", missing)]
    contents += [(i, n) for i, n, there in after if there]
    values: dict[str, Any] = {
        "generator": GENERATOR,
        "title": _title([*labels, *models], len(collection.runs), len(models)),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        "version": __version__,
        "css": Markup((HERE / "page.css").read_text()),
        "js": Markup((HERE / "page.js").read_text()),
        "problems_js": Markup((HERE / "page.problems.js").read_text()),
        "plotly": Markup(get_plotlyjs()),
        "figures": figures_data(drawn),
        "swatch": swatch,
        "notes": notes,
        "contents": contents,
        "runs": [row for i, g in enumerate(groups) for row in _rows(i, g)],
        "finals": finals,
        "evals": tables(collection) if models else [],
        "eval_settings": eval_settings(collection),
        "problems": problems,
        "legend": list(enumerate(labels)),
        "sections": sections,
        "settings": settings,
        "rollouts": rollouts,
        "missing": missing,
        "watch": None if watch is None else f"{watch:g}",
    }
    return env.get_template("page.html.j2").render(values)


def _title(labels: Sequence[str], runs: int, models: int) -> str:
    if 0 < len(labels) < 4:
        return f"Report: {', '.join(dict.fromkeys(labels))}"
    evaluated = "1 evaluated model" if models == 1 else f"{models} evaluated models"
    trained = "1 run" if runs == 1 else f"{runs} runs"
    if models:
        return f"Report of {trained} and {evaluated}" if runs else f"Report of {evaluated}"
    return f"Report of {trained}"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _fixed(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def swatch(group: int) -> Markup:
    """Return a group's line and symbol as SVG, in the colours of both themes."""
    light = palette.colour(group)
    dark = palette.dark_of()[light]
    stroke = palette.STROKES[palette.dash(group)]
    shape = SHAPES[palette.symbol(group)] if group >= 0 else ""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true" style="color:'
        f'light-dark({light},{dark})"><path d="M0 7h34" stroke="currentColor" stroke-width="2.2" '
        f'stroke-dasharray="{stroke}"/><g fill="currentColor">{shape}</g></svg>'
    )


def tile(index: int) -> Markup:
    """Return the colour and stripes of a part of a bar as an element of HTML."""
    light = palette.colour(index)
    stripes = ",".join(
        f"repeating-linear-gradient({angle}deg,{palette.PATTERN_INK} 0 2px,transparent 2px 6px)"
        for angle in palette.PATTERNS[index % len(palette.PATTERNS)][1]
    )
    style = f"background-color:light-dark({light},{palette.dark_of()[light]})"
    style += f";background-image:{stripes}" if stripes else ""
    return Markup(f'<span class="tile" aria-hidden="true" style="{style}"></span>')


def figures_data(figures: dict[str, Any]) -> Markup:
    """Return the figures as JSON that may stand inside a script element."""
    values = {"dark": palette.dark_of(), "figures": figures}
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e"))


def chart_values(chart: Chart, height: int, pngs: bool) -> dict[str, Any]:
    """Return what the template ``page.charts.html.j2`` needs of a chart.

    Args:
        height: of its figure in pixels.
        pngs: whether there is a PNG beside the page.
    """
    header, rows = chart.table()
    legend = _legend(chart)
    return {
        "key": chart.key, "title": chart.title, "paper": chart.paper, "caption": chart.caption,
        "png": f"{chart.key}.png" if pngs else "", "spoken": chart.spoken(), "header": header,
        "rows": rows, "legend": legend, "height": height,
    }  # fmt: skip


def _legend(chart: Chart) -> list[tuple[Markup, str]]:
    """Return the legend's entries, as (mark, name)."""
    if isinstance(chart, LineChart):
        entries = dict.fromkeys((line.group, line.label) for line in chart.lines)
        return [(swatch(group), label) for group, label in entries]
    if isinstance(chart, BubbleChart):
        return [(swatch(b.group), b.label) for b in chart.bubbles]
    if isinstance(chart, StackedBars):
        return [(tile(i), part) for i, part in enumerate(chart.parts)]
    return []


def _rows(index: int, group: Group) -> list[dict[str, Any]]:
    return [
        {
            "group": index, "label": group.label, "seed": "-" if run.seed is None else run.seed,
            "state": run.state, "steps": f"{int(run.steps[-1]) if len(run.steps) else 0:,}",
            "seconds": short(training_seconds(run)), "directory": run.directory,
        }
        for run in group.runs
    ]  # fmt: skip


def _rollouts(
    index: int, group: Group, samples: Mapping[str, list[Problem]]
) -> dict[str, Any] | None:
    """Return a group's problems to show: those of its first run that kept any."""
    kept = (samples.get(str(run.directory)) for run in group.runs)
    problems = next((p for p in kept if p), None)
    if not problems:
        return None
    kinds = [p.change for p in problems]
    counts = [f"{kinds.count(k):,} {k}" for k in dict.fromkeys(kinds) if k != "other"]
    chosen = choose(problems)
    shown = [
        {
            "name": p.name, "prompt": p.prompt, "answer": p.answer, "change": p.change,
            "grade": p.grade,
            "shown": [(m, p.samples[m]) for m in _order(p.samples)],
        }
        for p in chosen
    ]  # fmt: skip
    return {
        "id": index, "label": group.label, "problems": shown, "of": f"{len(problems):,}",
        "counts": ", ".join(counts) or "No prompt has graded responses before and after",
    }  # fmt: skip


def _order(models: Mapping[str, Any]) -> list[str]:
    """Return the models to show: before and after, else those that there are."""
    pair = [m for m in (BEFORE, AFTER) if m in models]
    return pair or sorted(models)[:2]
