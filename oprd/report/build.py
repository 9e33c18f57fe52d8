"""Making a report, once or again and again while runs go on."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oprd.atomic_files import write_whole
from oprd.errors import ConfigError, need_package
from oprd.report.collect import Collection, collect
from oprd.report.figures import figures
from oprd.report.png import write_png
from oprd.report.results import finals
from oprd.report.samples import read_samples

logger = logging.getLogger(__name__)

PAGE = "index.html"


@dataclass
class ReportConfig:
    """What to report, and where.

    Attributes:
        runs: directories of runs, comparisons, sweeps and evaluations, or that hold such.
        output_dir: directory for the page and the pictures.
        set_name: evaluation set whose final accuracy is compared; None: chosen (see `collect`).
        watch: seconds between two pages while a run goes on; None: one page.
    """

    runs: Sequence[Path]
    output_dir: Path
    set_name: str | None = None
    watch: float | None = None


def check(cfg: ReportConfig) -> None:
    """Check packages and the output directory.

    Raises:
        ConfigError: if a package is missing, or if ``output_dir`` can't be used.
    """
    for package in ("plotly", "jinja2"):
        need_package(package, "report", "oprd-report")
    if cfg.watch is not None and not cfg.watch >= 1:
        raise ConfigError(f"--watch must be at least 1 second, got {cfg.watch:g}")
    out = cfg.output_dir
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output_dir {out} is a file: choose a directory")
    file = out / PAGE
    if file.exists() and b'content="oprd-report"' not in file.read_bytes()[:2000]:
        raise ConfigError(
            f"{file} is no report of oprd and would be lost: choose another directory"
        )


def check_apart(out: Path, collection: Collection) -> None:
    """Check that a report is not written into what it reports on.

    Raises:
        ConfigError: if it would be.
    """
    for source in collection.sources:
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ConfigError(
                f"--output_dir {out} lies in {source}, which a report does not write to: choose "
                "another directory"
            )


def write_report(cfg: ReportConfig, pictures: bool = True) -> Collection:
    """Read the runs and write the page, then the PNGs.

    Args:
        pictures: whether to write PNGs. If not, the page reloads itself (``cfg.watch``).

    Returns:
        What was read.

    Raises:
        ConfigError: see `collect`, `check` and `check_apart`.
    """
    from oprd.report.page import page  # needs the extra that `check` asks for

    collection = collect(cfg.runs, cfg.set_name, wait=cfg.watch is not None)
    check_apart(cfg.output_dir, collection)
    samples = {str(run.directory): read_samples(run) for run in collection.runs}
    results = finals(collection, samples)
    charts, missing = figures(collection, results)
    watch = None if pictures else cfg.watch
    text = page(collection, charts, missing, results, samples, pictures, watch)
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    former = pictures_of(cfg.output_dir / PAGE)
    write_whole(cfg.output_dir / PAGE, text)
    for name in former - {f"{chart.key}.png" for chart in charts}:
        (cfg.output_dir / name).unlink(missing_ok=True)
    if pictures:
        read = {"run(s)": len(collection.runs), "evaluation(s)": len(collection.evals)}
        count = ", ".join(f"{number} {what}" for what, number in read.items() if number)
        logger.info(f"{cfg.output_dir / PAGE}: {count or 'nothing yet'}")
    for chart in charts if pictures else ():
        write_png(chart, cfg.output_dir / f"{chart.key}.png")
    return collection


def pictures_of(page: Path) -> set[str]:
    """Return the names of the PNGs beside a page that it links to."""
    return set(re.findall(r'href="([\w-]+\.png)"', page.read_text())) if page.exists() else set()


def report(cfg: ReportConfig) -> None:
    """Write a report, and with ``cfg.watch`` write it again until every run has ended.

    Raises:
        ConfigError: before anything is written.
    """
    check(cfg)
    if cfg.watch is not None:
        _follow(cfg, cfg.watch)
    collection = write_report(cfg)
    for note in collection.notes:
        logger.warning(note)
    for directory, note in collection.remarks:
        logger.warning(f"{directory}: {note}")


def _follow(cfg: ReportConfig, seconds: float) -> None:
    """Write pages without pictures until all runs have ended."""
    said = False
    while True:
        try:
            collection = write_report(cfg, pictures=False)
        except ConfigError as error:
            if not said:  # the first time, it is a mistake of the command
                raise
            logger.warning(str(error))
        else:
            if collection.ended:
                return
            if not said:
                logger.info(
                    f"{cfg.output_dir / PAGE} is written again every {seconds:g} s until the runs "
                    "end; Ctrl-C stops"
                )
                said = True
        time.sleep(seconds)
