"""The outcome of a run, and its file ``summary.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from oprd.atomic_files import write_json
from oprd.errors import ConfigError

SUMMARY = "summary.json"


@dataclass
class Summary:
    """The outcome of a run; also written to ``summary.json``.

    Attributes:
        directory: the run's directory.
        student: directory of the trained model; of the last checkpoint if the run was interrupted.
        steps: number of optimizer steps made.
        interrupted: whether a signal ended the run.
        evaluations: results by model, then by set.
        phases: seconds by phase.
        delta_peak_gb: largest memory of a student update beyond that in use at its start, in GiB.
        stopped_by: the number of the signal that ended the run.
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
    """Return evaluations as plain JSON values."""
    return {
        who: {name: r.as_dict() for name, r in results.items()}
        for who, results in evaluations.items()
    }


def write_summary(summary: Summary) -> None:
    """Write ``summary.json`` to the run's directory."""
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
    """Read the file of `write_summary`; return None if the run in the directory has not ended."""
    file = directory / SUMMARY
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{file} can't be read ({error}): it was cut off while it was copied. Copy it again"
        ) from error
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
    """Return whether the run in a directory made all of its steps."""
    summary = read_summary(directory)
    return summary is not None and not summary.interrupted


@dataclass(frozen=True)
class EvalResult:
    """The results of an evaluation set, as means over its prompts.

    Attributes:
        avg: share of right responses (Avg@k, 0..1).
        best: share of prompts with a right response among k (Best@k).
        dist_4g: 100 * unique / all whitespace-word 4-grams, pooled over a prompt's responses,
            then averaged; None if no response is four words long.
        length: mean number of tokens of a response, including EOS.
        truncated: share of responses without a final EOS.
        samples: k, the number of responses per prompt.
        problems: number of prompts; None in results of older versions.
        stderr: standard error of ``avg`` over prompts; None for a single one.
        pass_at: by j, pass@j: the unbiased chance that one of j responses is right, for powers of
            two below k, and k.
        pass_all: by j, pass^j: the chance that all of j responses are right.
        unboxed: share of responses without a complete box; None if the grader needs none.
        ungraded: number of responses on which the grader gave no verdict; they count as wrong.
    """

    avg: float
    best: float
    dist_4g: float | None
    length: float
    truncated: float
    samples: int
    problems: int | None = None
    stderr: float | None = None
    pass_at: dict[str, float] = field(default_factory=dict)
    pass_all: dict[str, float] = field(default_factory=dict)
    unboxed: float | None = None
    ungraded: int = 0

    def metrics(self, name: str) -> dict[str, float]:
        """Return the results as metrics named ``val/<set>/avg@k`` and so on."""
        k = self.samples
        values: dict[str, float | None] = {
            f"avg@{k}": self.avg,
            f"best@{k}": self.best,
            "dist_4g": self.dist_4g,
            "len": self.length,
            "truncated": self.truncated,
            f"avg@{k}_stderr": self.stderr,
            "unboxed": self.unboxed,
            "ungraded": self.ungraded or None,
        }
        values |= {f"pass@{j}": value for j, value in self.pass_at.items() if j != str(k)}
        values |= {f"pass^{j}": value for j, value in self.pass_all.items()}
        return {f"val/{name}/{key}": v for key, v in values.items() if v is not None}

    def as_dict(self) -> dict:
        return asdict(self)
