"""One run as the report sees it: its metrics by step, its evaluations and its settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oprd.report.read import document, flat, json_lines, mapping, number

METRICS, CONFIG, SUMMARY = "metrics.jsonl", "config.yaml", "summary.json"
FILES = (METRICS, CONFIG, SUMMARY)
BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"

_VALUE = re.compile(r"val/(.+)/([^/]+)")
_SECONDS = re.compile(r"time/(.+)_s")
_AVG = re.compile(r"avg@\d+")


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation on one set.

    Attributes:
        step: number of optimizer steps made.
        model: "student before", "student", "student after", or "teacher" and perhaps its name.
        values: by name, as in ``val/<set>/<name>``: ``avg@k``, ``best@k``, ``len``, ..
    """

    step: int
    model: str
    name: str
    values: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Avg@k, 0..1; NaN if it was not recorded."""
        return next((v for k, v in self.values.items() if _AVG.fullmatch(k)), math.nan)


@dataclass
class Run:
    """What could be read of a run.

    Attributes:
        name: the run's own name, or that of its directory.
        config: its settings by dotted name.
        steps: (S,) int64, the recorded training steps, in order.
        columns: by metric, (S,) float64; NaN where a step did not record it.
        lists: by metric whose values are lists (one value a layer), (S, L) float64, NaN likewise.
        seconds: (S,) float64, seconds of training up to and including each step, without loading,
            evaluation and saving.
        evaluations: in the order of the file.
        final: by model, by set, the results in ``summary.json``.
        phases: seconds by phase of the whole run.
        delta_peak: memory of the student's update in GiB beyond what was in use, NaN if unknown.
        notes: what could not be read.
    """

    directory: Path
    name: str
    state: str = "not finished"
    config: dict[str, Any] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    evaluations: list[Evaluation] = field(default_factory=list)
    final: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    delta_peak: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "interrupted")

    def seconds_at(self, step: int) -> float:
        """Return the seconds of training up to a step."""
        index = int(np.searchsorted(self.steps, step, side="right")) - 1
        return 0.0 if index < 0 else float(self.seconds[index])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return (step, accuracy) of the student's evaluations on a set, one a step, in order."""
        points = {
            e.step: e.accuracy
            for e in self.evaluations
            if e.name == name and not e.model.startswith(TEACHER) and math.isfinite(e.accuracy)
        }
        return sorted(points.items())

    def result(self, model: str, name: str) -> dict[str, Any]:
        """Return a model's results on a set; the metrics' last ones if the run has not ended.

        The keys are `oprd.observability.summary.EvalResult`'s: ``avg``, ``best``, ``length``, ..
        """
        if found := mapping(self.final.get(model, {}).get(name)):
            return found
        asked = "student" if model == AFTER else model
        for e in reversed(self.evaluations):
            if e.name == name and e.model.startswith(asked) and (e.step or model != AFTER):
                return _as_result(e)
        return {}

    def sets(self) -> list[str]:
        """Return the names of the evaluation sets with results, in order of appearance."""
        names = {e.name: None for e in self.evaluations}
        return list(names | dict.fromkeys(n for by in self.final.values() for n in by))


def _as_result(e: Evaluation) -> dict[str, Any]:
    result: dict[str, Any] = {"step": e.step}
    for key, value in e.values.items():
        name, _, k = key.partition("@")
        if name == "avg" and k.endswith("_stderr"):
            name = "stderr"
        elif name in ("avg", "best") and k.isdigit():
            result["samples"] = int(k)
        elif k:
            continue  # pass@j and what other versions add
        result[{"len": "length"}.get(name, name)] = value
    return result


def is_run(directory: Path) -> bool:
    """Return whether a directory holds one of the files that every run writes."""
    return any((directory / name).is_file() for name in FILES)


def read_run(directory: Path) -> Run:
    """Read a run. What can't be read is missing from it, and its notes say so."""
    notes: list[str] = []
    config = document(directory / CONFIG, notes)
    summary = document(directory / SUMMARY, notes)
    run = Run(directory, str(config.get("name") or directory.name), notes=notes)
    run.config = flat(config)
    if summary:
        run.state = "interrupted" if summary.get("interrupted") else "finished"
        run.final = {
            str(who): {str(n): mapping(r) for n, r in mapping(sets).items()}
            for who, sets in mapping(summary.get("evaluations")).items()
        }
        run.delta_peak = number(summary.get("mem/actor_update_delta_peak_GB"))
    if (directory / METRICS).is_file():
        _read_metrics(run, directory / METRICS)
    elif not summary:
        notes.append(f"there is no {METRICS}: the run has not begun, or was not written here")
    run.phases = _phases(summary, run)
    if math.isnan(run.delta_peak):
        peaks = run.columns.get("mem/actor_update_delta_peak_GB", np.zeros(0))
        run.delta_peak = float(np.nanmax(peaks)) if np.isfinite(peaks).any() else math.nan
    if not len(run.steps) and not run.evaluations and not run.final:
        run.state = "empty"
        notes.append("nothing is recorded yet: the run is empty")
    return run


def _phases(summary: dict[str, Any], run: Run) -> dict[str, float]:
    """Return seconds by phase from the summary, else those of the steps."""
    recorded = {str(k): number(v) for k, v in mapping(summary.get("seconds")).items()}
    if found := {k: v for k, v in recorded.items() if math.isfinite(v)}:
        return found
    return {
        match[1].replace("_", " "): float(np.nansum(values))
        for key, values in run.columns.items()
        if (match := _SECONDS.fullmatch(key))
    }


def _read_metrics(run: Run, file: Path) -> None:
    records: dict[int, dict[str, Any]] = {}
    without_step = repeated = last = 0
    for record in json_lines(file, run.notes):
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            without_step += 1
            continue
        values = _evaluations(run, step, record)
        if values.keys() <= {"step", "model"}:
            continue
        repeated += step <= last and bool(records)
        if step < last:  # a restart from an earlier step: what followed it is another history
            records = {s: r for s, r in records.items() if s < step}
            run.evaluations = [e for e in run.evaluations if e.step < step]
        records[step], last = values, step
    if without_step:
        run.notes.append(
            f"{file.name}: {without_step:,} lines have no whole number as step and are left out"
        )
    if repeated:
        run.notes.append(
            f"{file.name}: steps were repeated {repeated:,} times, as after a restart; the later "
            "ones are shown"
        )
    run.steps = np.array(sorted(records), np.int64)
    _fill(run, [records[s] for s in sorted(records)])


def _evaluations(run: Run, step: int, record: dict[str, Any]) -> dict[str, Any]:
    """Move the ``val/<set>/..`` values of a record to the run's evaluations; return the others."""
    found: dict[str, dict[str, float]] = {}
    others = {}
    for key, value in record.items():
        match = _VALUE.fullmatch(key)
        if match is None:
            others[key] = value
        elif math.isfinite(x := number(value)):
            found.setdefault(match[1], {})[match[2]] = x
    model = str(record.get("model", "student"))
    run.evaluations += [Evaluation(step, model, name, values) for name, values in found.items()]
    return others


def _fill(run: Run, records: list[dict[str, Any]]) -> None:
    """Fill the run's columns, lists and seconds."""
    odd: dict[str, None] = {}
    widths: dict[str, int] = {}
    for i, record in enumerate(records):
        for key, value in record.items():
            if key in ("step", "model"):
                continue
            if isinstance(value, list):
                widths[key] = max(widths.get(key, 0), len(value))
                continue
            if math.isnan(x := number(value)):
                if value is not None and not isinstance(value, float):
                    odd[key] = None
                continue
            if key not in run.columns:
                run.columns[key] = np.full(len(records), np.nan)
            run.columns[key][i] = x
    for key, width in widths.items():
        table = np.full((len(records), width), np.nan)
        for i, record in enumerate(records):
            if isinstance(value := record.get(key), list):
                table[i, : len(value)] = [number(x) for x in value]
        run.lists[key] = table
    if odd:
        run.notes.append(f"values that are no numbers are left out: {', '.join(sorted(odd))}")
    timed = [v for k, v in run.columns.items() if _SECONDS.fullmatch(k)]
    steps = np.nansum(np.stack(timed), axis=0) if timed else np.zeros(len(records))
    run.seconds = np.cumsum(steps)
