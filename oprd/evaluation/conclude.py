"""The end of an evaluation: grades, results and tables."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_json
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.evaluate import Sample
from oprd.evaluation.grader_pool import grade_all
from oprd.evaluation.report import by_problem, comparisons, set_results, show
from oprd.evaluation.store import RESULTS, Key, Store

logger = logging.getLogger(__name__)


def regrade(cfg: EvalRunConfig) -> dict[str, Any]:
    """Grade the samples of an evaluation again, and write its results."""
    assert cfg.output_dir is not None
    store = Store(Path(cfg.output_dir))
    settings = store.settings()
    if settings is None:
        raise ConfigError(f"{cfg.output_dir} holds no evaluation to grade again")
    if cfg.grader != "auto":
        for values in settings["sets"].values():
            values["grader"] = values["grader"] and cfg.grader
        settings = store.write_settings(settings)
    return conclude(store, settings, again=True)


def conclude(store: Store, settings: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """Grade the samples, write the files and show the tables; rank 0 only.

    Args:
        again: grade what has a grade already, too.
    """
    models: dict[str, Any] = {}
    problems: dict[str, dict[str, Any]] = {}
    teacher = settings.get("teacher")
    for label, model in settings["models"].items():
        samples = store.read(label)
        for name in model["sets"]:
            grader = settings["sets"][name]["grader"]
            if grader is not None:
                _grade(samples, name, grader, again)
        store.finish(label, samples, model["sets"])
        problems[label] = {}
        for name, of_set in model["sets"].items():
            wanted = of_set["problems"] * settings["sampling"]["samples"]
            there = sum(key[0] == name for key in samples)
            if there == wanted:
                problems[label][name] = by_problem(samples, name)
            else:
                logger.warning(
                    f"{label}: {there} of {wanted} samples of {name} are there: it is left out of "
                    "the results. The command that was interrupted goes on with it"
                )
        models[label] = {
            **{k: v for k, v in model.items() if k != "sets"},
            "sets": {
                name: {"grader": settings["sets"][name]["grader"]} | set_results(p)
                for name, p in problems[label].items()
            },
        }
        for file in sorted(store.model(label).glob("closeness_*.json")):
            models[label]["closeness"] = json.loads(file.read_text())
    results = {
        "version": settings["version"],
        "sampling": settings["sampling"],
        "teacher": teacher and teacher["path"],
        "models": models,
        "comparisons": comparisons(problems),
    }
    write_json(store.directory / RESULTS, results)
    show(results)
    logger.info(f"results: {store.directory / RESULTS}")
    return results


def _grade(samples: dict[Key, Sample], name: str, grader: str, again: bool) -> None:
    """Grade the samples of a set in place."""
    keys = [k for k, s in samples.items() if k[0] == name and (again or s.score is None)]
    responses, answers = [samples[k].response for k in keys], [samples[k].answer for k in keys]
    grades = grade_all(grader, responses, [a or "" for a in answers])
    for key, grade in zip(keys, grades, strict=True):
        samples[key] = replace(
            samples[key], score=grade.score, boxed=grade.boxed, failed=grade.failed
        )
