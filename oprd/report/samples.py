"""Responses that evaluations kept: before and after training, side by side, and their grades."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oprd.report.evals import is_eval
from oprd.report.read import json_lines, mapping, number
from oprd.report.run import AFTER, BEFORE, TEACHER, Run

LIMIT = 64 * 2**20
"""Bytes of a samples file that are read."""
TEXT = 4000
"""Characters of a response that are shown."""
PROMPTS = 16
"""Prompts that are shown of a run."""

_RIGHT, _WRONG = ("right", "correct", "true", "pass"), ("wrong", "incorrect", "false", "fail")
_ASIDE = ("checkpoints", "student")


@dataclass
class Sample:
    """One response. ``grade`` is 1 for right, 0 for wrong, and NaN for not graded."""

    response: str
    grade: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.grade):
            return "not graded"
        return {1.0: "right", 0.0: "wrong"}.get(self.grade, f"grade {self.grade:.2f}")

    @property
    def shown(self) -> str:
        return shortened(self.response)


@dataclass
class Problem:
    """A prompt of an evaluation set and the responses to it, by model."""

    name: str
    prompt: str
    answer: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def grade(self, model: str) -> float:
        """Return the mean grade of a model's responses, NaN if none is graded."""
        grades = [s.grade for s in self.samples.get(model, []) if s.grade == s.grade]
        return statistics.fmean(grades) if grades else math.nan

    @property
    def change(self) -> str:
        before, after = self.grade(BEFORE), self.grade(AFTER)
        if math.isnan(before) or math.isnan(after):
            return "other"
        if after != before:
            return "better" if after > before else "worse"
        return "still right" if after == 1 else "still wrong"


def read_samples(run: Run) -> list[Problem]:
    """Read a run's ``samples*.jsonl``, of each model its last evaluation.

    What can't be read is noted in ``run.notes``.
    """
    problems: dict[tuple[str, str, str], Problem] = {}
    without = 0
    steps: dict[tuple[str, str, str], dict[str, int]] = {}
    for file in _files(run.directory):
        inside = str(file.relative_to(run.directory))
        for record in json_lines(file, run.notes, LIMIT):
            text = _first(record, "response", "text", "completion")
            prompt = _first(record, "prompt", "question", "messages")
            if text is None or prompt is None:
                without += 1
                continue
            name = str(_first(record, "set", "dataset", "eval_set") or "")
            answer = _first(record, "answer", "ground_truth", "reference")
            key = (name, as_text(prompt), "" if answer is None else as_text(answer))
            problem = problems.setdefault(key, Problem(*key))
            step = _step(record)
            model = _model(str(_first(record, "model", "subject") or ""), step, inside)
            last = steps.setdefault(key, {})
            if step > last.get(model, step):  # a later evaluation of the same model: this one
                problem.samples[model] = []
            if step >= last.get(model, step):
                last[model] = step
                grade = grade_of(_first(record, "grade", "right", "correct", "score", "reward"))
                problem.samples.setdefault(model, []).append(Sample(as_text(text), grade))
    if without:
        run.notes.append(f"samples: {without:,} records without prompt or response are left out")
    return list(problems.values())


def _files(directory: Path) -> list[Path]:
    """Return the files of samples; of the evaluations of one model on one set, the last only."""
    last: dict[str, Path] = {}
    for file in sorted(directory.rglob("samples*.jsonl")):
        inside = file.relative_to(directory)
        if inside.parts[0] not in _ASIDE and not is_eval(file.parent.parent):
            last[re.sub(r"samples_\d+_", "samples_", str(inside))] = file
    return list(last.values())


def _first(record: dict[str, Any], *names: str) -> Any:
    for name in names:
        if (value := record.get(name)) is not None:
            return value
    return None


def _step(record: dict[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


@functools.lru_cache(maxsize=256)
def _model(said: str, step: int, file: str) -> str:
    """Return whose samples a record holds, from its ``model`` or else from its file's name."""
    for label in (BEFORE, AFTER, TEACHER):
        if label in said or label in file.replace("_", " ").replace("-", " "):
            return label
    if said in ("", "student"):
        return AFTER if step else BEFORE
    return said


def shortened(text: str) -> str:
    """Return a text of at most about `TEXT` characters: a long one's beginning, and its end, where
    the answer stands."""
    if len(text) <= TEXT:
        return text
    cut = f"\n\n[.. {len(text) - TEXT:,} characters are left out here ..]\n\n"
    return text[: TEXT // 2] + cut + text[-TEXT // 2 :]


def as_text(value: Any) -> str:
    """Return a prompt as text: a string itself, messages one a line with their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', 'message')}: {as_text(m['content'])}" for m in value)
    return json.dumps(value, ensure_ascii=False)


def grade_of(value: Any) -> float:
    """Return a recorded grade as a number: True and "right" are 1, what is unknown is NaN."""
    if isinstance(value, dict):
        return grade_of(_first(mapping(value), "grade", "right", "correct", "score", "value"))
    if isinstance(value, str):
        word = value.strip().lower()
        return 1.0 if word in _RIGHT else 0.0 if word in _WRONG else math.nan
    return float(value) if isinstance(value, bool) else number(value)


def choose(problems: Iterable[Problem], most: int = PROMPTS) -> list[Problem]:
    """Return problems to show: some that got better, worse, and stayed, in turn, in file order."""
    kinds: dict[str, list[Problem]] = {
        k: [] for k in ("better", "worse", "still wrong", "still right", "other")
    }
    for problem in problems:
        kinds[problem.change].append(problem)
    chosen: list[Problem] = []
    while len(chosen) < most and any(kinds.values()):
        for waiting in kinds.values():
            if waiting and len(chosen) < most:
                chosen.append(waiting.pop(0))
    return chosen


def problem_grades(problems: Iterable[Problem], model: str, name: str) -> list[float]:
    """Return the mean grade of each problem of a set that the model's responses are graded on."""
    grades = (p.grade(model) for p in problems if p.name in (name, ""))
    return [g for g in grades if g == g]
