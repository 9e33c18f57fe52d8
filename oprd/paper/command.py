"""``oprd-paper``: its jobs in order, and its report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from oprd.atomic_files import write_json, write_whole
from oprd.errors import ConfigError, Problems, need_package
from oprd.observability.console import console
from oprd.observability.memory import GIB, available_bytes
from oprd.observability.tables import TextTable, show
from oprd.output_paths import check_output_dir
from oprd.paper.collect import collect
from oprd.paper.jobs import JobsFailed, run_jobs
from oprd.paper.make import is_made
from oprd.paper.one import Job
from oprd.paper.recipe import Level, Places, check_rows, recipe
from oprd.paper.task import write_prompts
from oprd.report.read import document, mapping

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("models")
RESULTS, RATES = "results.json", "rates.yaml"
JOB_BYTES, MAKE_BYTES = 1.5 * GIB, 4 * GIB
"""Memory of a job, with what Python and its packages take, and of one that makes a teacher."""
LAST_SEED = 2**31 - 1
USUAL_ROLLOUTS = 32
LIGHT, HEAVY = 0.2, 12.0
"""Costs of an evaluation or a fit, and of a teacher from scratch, relative to a usual run."""


@dataclass
class PaperConfig:
    """Options of ``oprd-paper``.

    Attributes:
        output_dir: directory for runs and report. The same command goes on in it: runs that are
            finished are kept, and more rows or seeds are added to them.
        quick: the main rows with one seed, in minutes instead of an hour on two cores.
        rows: ids of the rows to run, as in the recipe (`oprd/paper/recipe.yaml`), in brackets:
            ``[oprd, opd_top1]``; null: those of the level. The report shows these and all of the
            level that are finished.
        seeds: seeds of the reported runs, in brackets: ``[0, 1, 2]``; null: those of the level.
        jobs: runs at a time; null: one for each core, as far as memory allows; on a GPU four.
        threads: CPU threads of each run; null: an equal part of the cores.
        tune: instead of reporting, choose the learning rates of ``rows`` from the recipe's grid,
            and write them to ``rates.yaml``.
    """

    output_dir: str = "runs/paper"
    quick: bool = False
    rows: list[str] | None = None
    seeds: list[int] | None = None
    jobs: int | None = None
    threads: int | None = None
    tune: bool = False

    @property
    def level_name(self) -> str:
        """The name of the level in the recipe."""
        return "quick" if self.quick else "default"

    def level(self) -> Level:
        """Return the level with the rows and seeds that were asked for."""
        level = recipe().levels[self.level_name]
        rows = level.rows if self.rows is None else tuple(self.rows)
        seeds = level.seeds if self.seeds is None else tuple(self.seeds)
        return replace(level, rows=rows, seeds=seeds)

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: with all problems.
        """
        need_package("plotly", "report", "oprd-paper")
        need_package("jinja2", "report", "oprd-paper")
        check_output_dir(self.output_dir)
        check_rows(self.rows or ())
        problems = Problems()
        problems.need_at_least_one({"jobs": self.jobs, "threads": self.threads})
        lists: dict[str, Sequence[Any] | None] = {"rows": self.rows, "seeds": self.seeds}
        for name, values in lists.items():
            problems.need(
                values is None or (len(values) > 0 and len(set(values)) == len(values)),
                f"{name} must be distinct values, at least one, got {values}",
            )
        tuned = set(recipe().tuned)
        others = [row for row in self.rows or () if row not in tuned]
        for seed in self.seeds or ():
            problems.need(0 <= seed <= LAST_SEED, f"seeds must lie in 0..{LAST_SEED}, got {seed}")
        problems.need(
            not (self.tune and others),
            f"tune: {', '.join(others)} share another row's learning rate; rows with their own are "
            f"{', '.join(recipe().tuned)}",
        )
        problems.refuse()


def run_paper(cfg: PaperConfig) -> None:
    """Do the jobs that are missing, and write the report.

    Raises:
        ConfigError: before any run, if a check fails.
        JobsFailed: after the report of what is done, if jobs failed.
        Interrupted: after a signal; the same command goes on.
    """
    cfg.check()
    level, directory = cfg.level(), Path(cfg.output_dir).absolute()
    places = Places(directory / "models", directory / "prompts", directory / "bridges")
    _prepare(directory, places)
    jobs = [*(tuning_jobs if cfg.tune else level_jobs)(level, directory, places)]
    at_once, threads = _width(cfg, jobs)
    logger.info(
        f"oprd-paper, level {cfg.level_name}: {len(jobs)} jobs in {directory}, {at_once} at a time "
        f"(threads of each: {threads}); what each prints is beside its directory, *.log.txt"
    )
    failure: JobsFailed | None = None
    with _alone(directory):
        try:
            run_jobs(jobs, at_once, threads)
        except JobsFailed as error:
            failure = error
    if cfg.tune:
        _choose(directory, jobs)
    else:
        _report(cfg, directory, places, at_once, threads)
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory, in which a second command would train the same runs.

    Raises:
        ConfigError: if another command holds it.
    """
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"output_dir {directory}: another oprd-paper is running in it. Wait for it, or "
                "choose a new directory"
            ) from error
        yield


def _width(cfg: PaperConfig, jobs: Sequence[Job]) -> tuple[int, int]:
    """Return the number of jobs at a time, and of threads of each."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = cfg.jobs
    if at_once is None:
        memory = available_bytes()
        makes = any(job.kind == "make" and not job.done for job in jobs)
        fits = cores if memory is None else int(memory / (MAKE_BYTES if makes else JOB_BYTES))
        at_once = min(4 if torch.cuda.is_available() else cores, cores, max(1, fits))
    return at_once, cfg.threads or max(1, cores // at_once)


def _prepare(directory: Path, places: Places) -> None:
    """Write the prompts and the models that come with the package.

    Raises:
        ConfigError: if the directory holds something else, or runs of another recipe.
    """
    r = recipe()
    file = directory / "recipe.json"
    ours = {
        "base": r.base,
        "fit": r.fit,
        "rows": {i: vars(row) | {"rate": r.rate(i)} for i, row in r.rows.items()},
        "bridges": {i: vars(b) for i, b in r.bridges.items()},
        "steps": {i: level.steps for i, level in r.levels.items()},
    }
    ours = json.loads(json.dumps(ours, default=list))
    if file.exists():
        _compare(directory, file, ours)
    elif directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"output_dir {directory} holds other files: choose a new directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {directory} can't be made: {error}") from error
    write_json(file, ours)
    if not (places.prompts / "val.jsonl").exists():
        write_prompts(places.prompts)
    for shipped in sorted(SHIPPED.iterdir()):
        if not is_made(places.models / shipped.name):
            shutil.copytree(shipped, places.models / shipped.name, dirs_exist_ok=True)


def _compare(directory: Path, file: Path, ours: dict[str, Any]) -> None:
    """Check that finished runs are of this recipe; rows may have been added or left out."""
    theirs = mapping(document(file, []))
    parts = ("base", "fit", "bridges", "steps")
    changed = [part for part in parts if theirs.get(part) != ours[part]]
    changed += [
        f"rows.{i}"
        for i, row in mapping(theirs.get("rows")).items()
        if row != ours["rows"].get(i, row) and (directory / "rows" / i).exists()
    ]
    if changed:
        raise ConfigError(
            f"output_dir {directory} holds runs of another version of the recipe (differing: "
            f"{', '.join(changed)}): choose a new directory"
        )


def level_jobs(level: Level, directory: Path, places: Places) -> Iterator[Job]:
    """Yield the jobs of a level: models and bridges first, then all rows seed by seed."""
    r = recipe()
    teachers = dict.fromkeys(r.teacher(row) for row in level.rows)
    yield from _made(level, places, teachers, directory)
    for model in ("student", *teachers):
        needs = () if model in ("student", "teacher") else (f"make {model}",)
        yield Job(
            "model", model, directory / "evaluated" / model, places, level,
            weight=LIGHT, needs=needs,
        )  # fmt: skip
    for seed in level.seeds:
        for row in level.rows:
            where = directory / "rows" / row / f"seed_{seed}"
            yield Job("row", row, where, places, level, seed, None, _weight(row), _needs(row))


def tuning_jobs(level: Level, directory: Path, places: Places) -> Iterator[Job]:
    """Yield the runs that choose learning rates, of the level's rows that have their own."""
    r = recipe()
    rows = [row for row in r.tuned if row in level.rows]
    yield from _made(level, places, dict.fromkeys(r.teacher(row) for row in rows), directory, rows)
    for row in rows:
        for rate in r.rates:
            where = directory / "tuning" / row / f"lr_{rate:g}"
            yield Job(
                "tuning", row, where, places, level, r.tuning_seed, rate, _weight(row), _needs(row)
            )


def _made(
    level: Level,
    places: Places,
    teachers: Sequence[str] | dict[str, None],
    directory: Path,
    rows: Sequence[str] = (),
) -> Iterator[Job]:
    """Yield the jobs that make teachers and bridges."""
    r = recipe()
    for model in teachers:
        if model != "teacher":
            yield Job("make", model, places.models / model, places, level, weight=HEAVY)
    bridges = dict.fromkeys(b for row in rows or level.rows for b in r.bridges_of(row))
    for bridge in bridges:
        needs = (f"make {r.bridges[bridge].teacher}",)
        yield Job(
            "fit", bridge, directory / "bridges" / bridge, places, level, weight=LIGHT, needs=needs
        )


def _needs(row: str) -> tuple[str, ...]:
    r = recipe()
    teacher = r.teacher(row)
    made = () if teacher == "teacher" else (f"make {teacher}",)
    return (*made, *(f"fit {bridge}" for bridge in r.bridges_of(row)))


def _weight(row: str) -> float:
    return 0.3 + 0.7 * recipe().rollouts(row) / USUAL_ROLLOUTS


def _choose(directory: Path, jobs: Sequence[Job]) -> None:
    """Choose each row's learning rate by the accuracy at the last step, the lowest in a tie."""
    found: dict[str, dict[float, float]] = {}
    for job in jobs:
        if job.kind == "tuning" and job.done:
            summary = json.loads(job.record.read_text())
            accuracy = summary["evaluations"]["student after"]["val"]["avg"]
            assert job.rate is not None
            found.setdefault(job.name, {})[job.rate] = accuracy
    rates = [f"{rate:g}" for rate in recipe().rates]
    rows, chosen = [], {}
    for name, by in found.items():
        chosen[name] = max(sorted(by), key=lambda rate: by[rate])
        rows.append(
            [
                name,
                *(f"{by[x]:.3f}" if x in by else "-" for x in recipe().rates),
                f"{chosen[name]:g}",
            ]
        )
    write_whole(directory / RATES, yaml.safe_dump(chosen, sort_keys=False))
    table = TextTable("accuracy on val by learning rate", ["row", *rates, "chosen"], rows)
    show(console, [table])
    console.print(f"rates: {directory / RATES}")


def _report(cfg: PaperConfig, directory: Path, places: Places, at_once: int, threads: int) -> None:
    """Write the report of what is done of the level, and of what was asked for besides."""
    from oprd.paper.report import summary, write_report
    from oprd.paper.verdict import NOT_RUN

    level = recipe().levels[cfg.level_name]
    found = [d.name.removeprefix("seed_") for d in directory.glob("rows/*/seed_*") if d.is_dir()]
    seeds = sorted({*level.seeds, *(int(seed) for seed in found if seed.isdigit())})
    rows = dict.fromkeys((*level.rows, *cfg.level().rows))
    level = replace(level, rows=tuple(rows), seeds=tuple(seeds))
    jobs = [*level_jobs(level, directory, places)]
    results = collect(directory, jobs, cfg.level_name, level, at_once, threads)
    write_json(directory / RESULTS, results)
    logger.info("writing the report")
    answers = write_report(results, directory / "report")
    show(console, [_accuracy(results)])
    known = [answer for answer in answers if answer.verdict != NOT_RUN]
    console.print(summary(known, brief=True), markup=False)
    if rest := len(answers) - len(known):
        console.print(f"{rest} more questions need rows that were not run")
    console.print(f"report: {directory / 'report' / 'index.html'}")


def _accuracy(results: dict[str, Any]) -> TextTable:
    """Return a table of the accuracy of each model and row, means over seeds."""
    sets = results["sets"]
    found = {name.replace("_", " "): [by_set] for name, by_set in results["models"].items()}
    found |= {row["name"]: [run["results"] for run in row["runs"]] for row in results["rows"]}
    rows = []
    for name, runs in found.items():
        means = [fmean(run[s]["avg"] for run in runs) for s in sets]
        rows.append([name, *(f"{100 * x:.1f}" for x in (*means, fmean(means))), str(len(runs))])
    heads = ["row", *(s.replace("_", "\n") for s in sets), "mean", "runs"]
    return TextTable("accuracy in %", heads, rows)
