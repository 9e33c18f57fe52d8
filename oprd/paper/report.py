"""The report of ``oprd-paper``: a page, its pictures, a summary in Markdown and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_json, write_whole
from oprd.paper.figures import charts
from oprd.paper.measures import Results
from oprd.paper.questions import SECTIONS
from oprd.paper.tables import beside, summary
from oprd.paper.verdict import Answer, answers
from oprd.report.build import PAGE, pictures_of
from oprd.report.png import write_png

SUMMARY, VERDICTS = "summary.md", "verdicts.json"
STATISTICS = (
    "Rows are compared seed by seed; 95 % intervals are Student's over the seeds. With one seed "
    "they are over the problems and do not tell how another seed would come out. Each interval is "
    "that of its difference alone. All rows have the same problems, and each tuned objective's "
    "learning rate was chosen from the same grid."
)


def write_report(results: Mapping[str, Any], directory: Path) -> list[Answer]:
    """Write the report of ``results.json``, which may lack rows, seeds and measurements.

    Args:
        results: as `oprd.paper.collect.collect` returns them.
        directory: gets ``index.html``, a PNG for each chart, ``summary.md`` and ``verdicts.json``.

    Returns:
        The answers, in the page's order.

    Raises:
        ModuleNotFoundError: without the packages of the extra ``report``, plotly and jinja2, which
            the command asks for before its runs.
    """
    from oprd.paper.page import page

    read = Results(results)
    found, drawn, made = answers(read), charts(read), about(read)
    directory.mkdir(parents=True, exist_ok=True)
    former = pictures_of(directory / PAGE)
    write_whole(directory / PAGE, page(read, found, drawn, made))
    for name in former - {f"{chart.key}.png" for chart in drawn}:
        (directory / name).unlink(missing_ok=True)
    for chart in drawn:
        write_png(chart, directory / f"{chart.key}.png")
    write_whole(directory / SUMMARY, _markdown(read, found, made))
    write_json(directory / VERDICTS, [asdict(answer) for answer in found])
    return found


def about(results: Results) -> list[tuple[str, str]]:
    """Return how the results were made, as (name, value)."""
    v = results.values
    runs = sum(len(row["runs"]) for row in results.rows.values())
    seeds = ", ".join(map(str, results.seeds())) or "none yet"
    rows = [
        ("level", f"{v.get('level')}: {runs} runs of {len(results.rows)} rows, seeds {seeds}"),
        ("machine", f"{v.get('machine')}; jobs at once: {v.get('jobs')}, threads of each: "
         f"{v.get('threads')}; time of all runs: {_duration(v.get('seconds') or 0)}"),
        ("a run", f"{v.get('steps')} steps of {v.get('rollouts')} rollouts; validation every "
         f"{v.get('val_every')} steps"),
        ("accuracy", f"Avg@{v.get('samples')} on {v.get('problems')} problems in each of "
         f"{', '.join(n.replace('_', ' ') for n in results.sets)}"),
        ("statistics", STATISTICS),
    ]  # fmt: skip
    return rows


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _markdown(results: Results, found: Sequence[Answer], made: Sequence[tuple[str, str]]) -> str:
    parts = ["# The OPRD paper in miniature", "\n".join(f"- {n}: {v}" for n, v in made)]
    parts.append(summary(found))
    for section in SECTIONS:
        table = beside(results, section)
        if table is not None:
            place = f"{section.place}: " if section.place else ""
            parts += [f"## {place}{section.title}", section.about, table.markdown()]
    return "\n\n".join(parts) + "\n"
