"""What the finished jobs of ``oprd-paper`` found, as one document, ``results.json``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oprd.benchmark.report import machine
from oprd.distributed.device import check_device
from oprd.paper.one import MEASURED, Job, last_stage, recipe_stages
from oprd.paper.recipe import Level, recipe
from oprd.paper.task import make_tokenizer
from oprd.report.run import AFTER, Run, read_run

LOGGED = (
    "response_length/mean", "rep/cosine_similarity", "actor/pg_loss", "val-topk/overlap_ratio",
    "actor/entropy", "teacher/entropy",
)  # fmt: skip
PHASES = ("rollout", "teacher", "student update")


def collect(
    directory: Path, jobs: Sequence[Job], level_name: str, level: Level, at_once: int, threads: int
) -> dict[str, Any]:
    """Return the results of the jobs that are done; see the module's docstring.

    Args:
        directory: ``output_dir``; runs' directories are given relative to it.
        level_name: name of ``level``.
        at_once: number of jobs at a time.
        threads: number of threads of each.
    """
    r = recipe()
    done = [job for job in jobs if job.done]
    models: dict[str, Any] = {}
    start = None
    for job in done:
        if job.kind == "model":
            found = json.loads(job.record.read_text())
            models[job.name] = found["results"]
            start = found["measured"] or start
    first = models.get("student", {}).get("val", {}).get("avg")
    rows: list[dict[str, Any]] = []
    for name in level.rows:
        runs = [
            _run(directory, job, first) for job in done if (job.kind, job.name) == ("row", name)
        ]
        if runs:
            rows.append(
                {
                    "id": name,
                    "name": r.rows[name].name,
                    "teacher": r.teacher(name),
                    "lr": r.rate(name),
                    "steps": level.steps,
                    "rollouts": r.rollouts(name),
                    "runs": runs,
                }
            )
    sets = r.base["eval"]["sets"]
    reported = [name for name in sets if name != "val"]
    return {
        "level": level_name,
        "machine": _machine(at_once, threads),
        "seconds": sum(run["wall"] for row in rows for run in row["runs"]),
        "jobs": at_once,
        "threads": threads,
        "steps": level.steps,
        "rollouts": r.rollouts(level.rows[0]),
        "samples": r.base["eval"]["samples"],
        "problems": sets[reported[0]]["limit"],
        "val_every": sets["val"]["every"],
        "vocabulary": len(make_tokenizer()),
        "sets": reported,
        "models": models,
        "start": start,
        "rows": rows,
    }


def _machine(at_once: int, threads: int) -> str:
    device = check_device("auto")
    found = machine(device)
    cores = "" if device.type == "cuda" else f"{at_once * threads} cores of "
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "oprd"))
    return f"{cores}{found['device']}; {versions}"


def _run(directory: Path, job: Job, first: float | None) -> dict[str, Any]:
    """Return what a row's run with one seed found.

    Args:
        first: accuracy of the student before training on ``val``.
    """
    last = last_stage(job.directory)
    parts = [last]
    if last != job.directory:
        parts = [job.directory / stage for stage in recipe_stages(job.directory)]
    curve: list[list[float]] = [] if first is None else [[0, 0.0, first]]
    logged: dict[str, list[list[float]]] = {}
    seconds = dict.fromkeys(PHASES, 0.0)
    wall, steps, trained, tokens = 0.0, 0, 0.0, 0.0
    for part in parts:
        run = read_run(part)
        spent = np.cumsum(sum(_column(run, f"time/{p.replace(' ', '_')}_s") for p in PHASES))
        at = {0: 0.0, **dict(zip(run.steps.tolist(), spent.tolist(), strict=True))}
        curve += [[steps + s, trained + at[s], x] for s, x in run.curve("val") if s]
        for metric in LOGGED:
            if (values := run.columns.get(metric)) is not None:
                logged.setdefault(metric, []).extend(
                    [steps + s, v]
                    for s, v in zip(run.steps.tolist(), values.tolist(), strict=True)
                    if math.isfinite(v)
                )
        for phase in PHASES:
            seconds[phase] += run.phases.get(phase, 0.0)
        tokens += float(
            np.nansum(_column(run, "perf/tokens_per_second") * np.diff(spent, prepend=0))
        )
        wall += sum(run.phases.values())
        steps += int(run.steps[-1])
        trained += float(spent[-1])
    results = run.final[AFTER]
    return {
        "seed": job.seed,
        "directory": str(last.relative_to(directory)),
        "results": results,
        "curve": curve,
        "logged": logged,
        "grades": {name: _grades(last, name) for name in results},
        "seconds": seconds,
        "wall": wall,
        "tokens_per_second": tokens / trained if trained else 0.0,
        "measured": json.loads((job.directory / MEASURED).read_text()),
    }


def _column(run: Run, name: str) -> np.ndarray:
    return np.nan_to_num(run.columns.get(name, np.zeros(len(run.steps))))


def _grades(directory: Path, name: str) -> list[float]:
    """Return the mean grade of each problem after training, from the samples that were kept."""
    grades: dict[int, list[float]] = {}
    for file in (directory / "samples").glob(f"*_student_after_{name}.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            grades.setdefault(sample["problem"], []).append(sample["score"])
    return [statistics.fmean(grades[problem]) for problem in sorted(grades)]
