"""One job of ``oprd-paper``: a training, the fit of a bridge, or the evaluation of a model.

Each job has a directory, and a file in it that is written last.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_json
from oprd.config.io import from_values
from oprd.data.prompts import load_prompts
from oprd.distributed.device import check_device
from oprd.engines.factory import engine_on
from oprd.evaluation.evaluate import evaluate
from oprd.models.loading import load_model, load_tokenizer
from oprd.observability.signals import Interrupted
from oprd.observability.summary import SUMMARY, finished
from oprd.paper.make import MADE, make
from oprd.paper.recipe import TEACHER, Level, Places, recipe
from oprd.training.stages import merged, run_stages
from oprd.training.trainer import train

logger = logging.getLogger(__name__)

MEASURED = "measured.json"
RESULTS = "results.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        kind: ``row``: train a row with a seed. ``tuning``: train it with a learning rate. ``make``:
            train a teacher from scratch. ``fit``: fit a bridge. ``model``: evaluate a model as it
            is.
        name: of the row, bridge or model.
        directory: of its files.
        weight: cost, relative to a row with the usual number of rollouts.
        needs: jobs that have to be done before, by `title`.
    """

    kind: str
    name: str
    directory: Path
    places: Places
    level: Level
    seed: int = 0
    rate: float | None = None
    weight: float = 1.0
    needs: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """Its name for people."""
        if self.kind == "tuning":
            return f"{self.name}, lr {self.rate:g}"
        return (
            f"{self.name}, seed {self.seed}" if self.kind == "row" else f"{self.kind} {self.name}"
        )

    @property
    def record(self) -> Path:
        """The file that is written last."""
        if self.kind == "fit":
            return self.places.bridge(self.name)
        files = {"row": MEASURED, "tuning": SUMMARY, "make": MADE, "model": RESULTS}
        return self.directory / files[self.kind]

    @property
    def done(self) -> bool:
        """Whether the job is done."""
        if self.kind == "tuning":
            return finished(self.directory)
        return self.record.exists()


def last_stage(directory: Path) -> Path:
    """Return the directory of a row's run; of stages, of the last."""
    stages = directory / "stages.json"
    return directory if not stages.exists() else directory / recipe_stages(directory)[-1]


def recipe_stages(directory: Path) -> list[str]:
    """Return the names of a row's stages, the first first."""
    return [*recipe().rows[directory.parent.name].stages]


def run(job: Job) -> None:
    """Do a job.

    Raises:
        Interrupted: if a signal ended it; the same job goes on later.
    """
    if job.kind == "fit":
        _fit(job)
    elif job.kind == "model":
        _evaluate(job)
    elif job.kind == "make":
        make(job.places.models, [job.name])
    else:
        _train(job)
        if job.kind == "row":
            _measure(job)


def _fit(job: Job) -> None:
    from oprd.bridge.fit import fit

    job.places.bridges.mkdir(parents=True, exist_ok=True)
    fit(recipe().fit_config(job.name, job.places, job.record))


def _train(job: Job) -> None:
    """Train, or go on from the newest checkpoint."""
    r, row = recipe(), recipe().rows[job.name]
    shared = r.shared(job.places, job.level, job.seed, job.directory)
    if row.stages:
        steps = [job.level.steps // len(row.stages)] * len(row.stages)
        steps[-1] += job.level.steps - sum(steps)
        stages = {
            stage: r.options(stage, job.places) | {"steps": n, "name": f"{row.name}: {stage}"}
            for stage, n in zip(row.stages, steps, strict=True)
        }
        summary = run_stages(shared, stages)
    else:
        values = merged(shared, r.options(job.name, job.places, job.rate) | {"name": row.name})
        if job.kind == "tuning":
            values["eval"]["sets"] = {"val": values["eval"]["sets"]["val"]}
        summary = train(from_values(values))
    if summary is not None and summary.interrupted:
        raise Interrupted(summary.stopped_by or signal.SIGTERM)


def _measure(job: Job) -> None:
    """Compare the trained student with its teacher."""
    from oprd.paper.after import measure

    r, row = recipe(), recipe().rows[job.name]
    first = r.rows[row.stages[0]] if row.stages else row
    bridge = None if first.bridge is None else job.places.bridge(first.bridge)
    measured = measure(
        last_stage(job.directory) / "student",
        job.places.models / r.teacher(job.name),
        job.places.prompts / "val.jsonl",
        bridge,
        first.rank,
    )
    write_json(job.record, measured)


def _evaluate(job: Job) -> None:
    """Evaluate a model on all sets, and compare the student before training with its teacher."""
    from oprd.paper.after import measure

    path = job.places.models / job.name
    values = recipe().shared(job.places, job.level, job.seed, job.directory)
    cfg = from_values(values)
    cfg.student.path = str(path)
    tokenizer, model = load_tokenizer(str(path)), load_model(cfg.student, check_device(cfg.device))
    engine = engine_on(model, tokenizer, cfg.rollout.engine, cfg.eval.batch_size)
    results: dict[str, Any] = {}
    for name, source in cfg.eval.sets.items():
        prompts = load_prompts(source, cfg.data, tokenizer, for_evaluation=True).prompts
        results[name] = evaluate(engine, tokenizer, prompts, cfg.eval).as_dict()
        logger.info(f"{job.name} on {name}: {results[name]['avg']:.4f}")
    measured = None
    if job.name == "student":
        measured = measure(path, job.places.models / TEACHER, job.places.prompts / "val.jsonl")
    job.directory.mkdir(parents=True, exist_ok=True)
    write_json(job.record, {"results": results, "measured": measured})
