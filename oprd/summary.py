"""How a run ended, in its directory's ``summary.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from oprd.checkpoint.files import newest, write_json
from oprd.checkpoint.resume import CHECKPOINTS
from oprd.config import TrainConfig
from oprd.errors import ConfigError
from oprd.evaluate import EvalResult

SUMMARY = "summary.json"


@dataclass
class Summary:
    """How a run ended; also written to ``summary.json``.

    Attributes:
        directory: the run's.
        student: the trained model's directory; of an interrupted run the checkpoint's.
        steps: optimizer steps made.
        interrupted: whether a signal ended it.
        evaluations: by model, then by set.
        phases: seconds by phase.
        delta_peak_gb: GiB by which a student update rose above what was there when it began.
        stopped_by: the number of the signal.
    """

    directory: Path
    student: Path
    steps: int
    interrupted: bool
    evaluations: dict[str, dict[str, EvalResult]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    delta_peak_gb: float | None = None
    stopped_by: int | None = None


def plain(evaluations: dict[str, dict[str, EvalResult]]) -> dict[str, dict[str, dict]]:
    """As JSON."""
    return {
        who: {name: r.as_dict() for name, r in results.items()}
        for who, results in evaluations.items()
    }


def write_summary(summary: Summary) -> None:
    """``summary.json`` in the run's directory."""
    values = {
        "student": str(summary.student),
        "steps": summary.steps,
        "interrupted": summary.interrupted,
        "evaluations": plain(summary.evaluations),
        "seconds": summary.phases,
        "mem/actor_update_delta_peak_GB": summary.delta_peak_gb,
    }
    write_json(summary.directory / SUMMARY, values)


def read_summary(directory: Path) -> Summary | None:
    """What `write_summary` has written; None if the run in a directory has not ended."""
    file = directory / SUMMARY
    if not file.exists():
        return None
    values = json.loads(file.read_text())
    evaluations = {
        who: {name: EvalResult(**r) for name, r in results.items()}
        for who, results in values["evaluations"].items()
    }
    return Summary(
        directory,
        Path(values["student"]),
        values["steps"],
        values["interrupted"],
        evaluations,
        values["seconds"],
        values["mem/actor_update_delta_peak_GB"],
    )


def finished(directory: Path) -> bool:
    """Whether the run in a directory went through to its end."""
    summary = read_summary(directory)
    return summary is not None and not summary.interrupted


def done_already(cfg: TrainConfig, directory: Path) -> Summary | None:
    """The summary of the run in a directory, if it has made ``cfg.steps`` steps to its end.

    Raises:
        ConfigError: if it ended after fewer or more, and there is nothing to go on from.
    """
    summary = read_summary(directory)
    if summary is None or summary.interrupted:
        return None
    if summary.steps == cfg.steps:
        print(f"finished already: {summary.student}")
        return summary
    if newest(directory / CHECKPOINTS) is None:
        raise ConfigError(
            f"output_dir {directory} holds a run that ended after {summary.steps} steps and kept "
            f"no checkpoint to go on from to steps={cfg.steps}: choose a new directory"
        )
    return None
