"""Directories that ``oprd-eval`` wrote: settings, results, and every sample's grade.

A file of samples may be larger than memory. Of each sample its grade and its place in the file are
kept; `Model.record` reads it again where its text is shown.
"""

from __future__ import annotations

import itertools
import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oprd.report.read import document, mapping, number, placed_lines
from oprd.report.run import is_run

SETTINGS, RESULTS, SAMPLES, PARTS = "settings.json", "results.json", "samples.jsonl", "parts"
RIGHT, WRONG, FAILED, UNGRADED = "1", "0", "x", "?"
"""Verdicts on a sample; failed: the grader gave none, which counts as wrong."""
KEPT = 1000
"""Characters of each prompt that are kept, for its line in the list of problems."""
_ASIDE = ("checkpoints", "student", "samples")


@dataclass
class Tally:
    """A model's samples of one problem.

    Attributes:
        prompt, answer: their beginnings, as text.
        verdicts: one character a sample, in the order of the file.
        places: the samples' places in the file, in bytes.
    """

    prompt: str = ""
    answer: str = ""
    verdicts: str = ""
    places: array[int] = field(default_factory=lambda: array("q"))

    @property
    def share(self) -> float:
        """Share of right samples, 0..1."""
        return self.verdicts.count(RIGHT) / len(self.verdicts)


@dataclass
class Model:
    """What an evaluation kept of one model.

    Attributes:
        label: its name, unique in the report.
        settings: by name, what it was sampled with.
        sets: by set, the settings of `Evaluation.sets` and of the model's own prompts.
        results: by set, as in ``results.json``; empty if it is not there.
        closeness: by set, the comparison with the teacher.
        problems: by set and problem, its samples.
        prefix: by set, the beginning that all prompts share.
    """

    label: str
    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    closeness: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, dict[int, Tally]] = field(default_factory=dict)
    prefix: dict[str, str] = field(default_factory=dict)

    def record(self, place: int) -> dict[str, Any]:
        """Read a sample again; empty if the file has changed."""
        try:
            with (self.directory / SAMPLES).open("rb") as stream:
                stream.seek(place)
                return mapping(json.loads(stream.readline().decode(errors="replace")))
        except (OSError, ValueError, RecursionError):
            return {}


@dataclass
class Evaluation:
    """What could be read of an evaluation's directory.

    Attributes:
        ended: whether all samples are there.
        notes: what could not be read.
    """

    directory: Path
    models: list[Model] = field(default_factory=list)
    ended: bool = True
    notes: list[str] = field(default_factory=list)


def is_eval(directory: Path) -> bool:
    """Return whether ``oprd-eval`` has written into a directory."""
    if not any((directory / name).is_file() for name in (SETTINGS, RESULTS)):
        return False
    unheard: list[str] = []
    known = [document(directory / name, unheard) for name in (SETTINGS, RESULTS)]
    return any(isinstance(d.get("models"), dict) for d in known) or any(
        directory.glob(f"*/{SAMPLES}")
    )


def find_evals(path: Path, depth: int) -> list[Path]:
    """Return the directories of evaluations at or below a path, those in runs too."""
    if is_eval(path):
        return [path]
    if depth == 0:
        return []
    aside = _ASIDE if is_run(path) else ()
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [
        found
        for p in below
        if p.name not in aside and ".unfinished_" not in p.name
        for found in find_evals(p, depth - 1)
    ]


def read_eval(directory: Path) -> Evaluation:
    """Read an evaluation. What can't be read is missing from it, and its notes say so."""
    found = Evaluation(directory)
    settings = document(directory / SETTINGS, found.notes)
    results = document(directory / RESULTS, found.notes)
    samples = {
        label: file.parent
        for file in sorted(directory.glob(f"*/{SAMPLES}"))
        if (label := _label(file))
    }
    both = mapping(settings.get("models")) | mapping(results.get("models"))
    asked, concluded = mapping(settings.get("models")), mapping(results.get("models"))
    for label in both | samples:
        model = Model(label, samples.get(label, directory / label))
        _add_settings(model, settings, mapping(asked.get(label)), directory)
        of_model = mapping(concluded.get(label))
        model.results = {n: mapping(r) for n, r in mapping(of_model.get("sets")).items()}
        model.closeness = {n: mapping(r) for n, r in mapping(of_model.get("closeness")).items()}
        if label in samples:
            _read_samples(model, found.notes)
        if not model.results and not model.problems:
            found.notes.append(f"{label} has no results yet: it is being sampled, or was stopped")
            found.ended = False
            continue
        for name in mapping(mapping(asked.get(label)).get("sets")).keys() - model.results.keys():
            found.notes.append(f"{label} has no results on {name} yet")
            found.ended = False
        found.models.append(model)
    if any(directory.glob(f"*/{PARTS}/*.jsonl")):
        found.ended = False
    return found


def _label(file: Path) -> str:
    """Return the label of the model whose samples a file holds: that of its first line."""
    for _, record in placed_lines(file, []):
        return str(record.get("model") or file.parent.name)
    return ""


def _add_settings(
    model: Model, settings: dict[str, Any], own: dict[str, Any], directory: Path
) -> None:
    shown = {"directory": str(directory), "version": settings.get("version")}
    shown |= {k: own.get(k) for k in ("path", "step", "weights")}
    model.settings = {**shown, **mapping(settings.get("sampling"))}
    if teacher := mapping(settings.get("teacher")):
        model.settings["teacher"] = teacher.get("path")
    common = mapping(settings.get("sets"))
    for name, of_model in mapping(own.get("sets")).items():
        values = mapping(common.get(name)) | mapping(of_model)
        model.sets[name] = {k: v for k, v in values.items() if k != "prompts"}


def _read_samples(model: Model, notes: list[str]) -> None:
    without, damaged = 0, len(notes)
    prefix: dict[str, str] = {}
    for place, record in placed_lines(model.directory / SAMPLES, notes):
        name, problem = record.get("set"), record.get("problem")
        response = record.get("response")
        if not isinstance(name, str) or type(problem) is not int or not isinstance(response, str):
            without += 1
            continue
        tallies = model.problems.setdefault(name, {})
        if (tally := tallies.get(problem)) is None:
            prompt = str(record.get("prompt") or "")
            answer = record.get("answer")
            tally = Tally(prompt[:KEPT], "" if answer is None else str(answer)[:KEPT])
            tallies[problem] = tally
            prefix[name] = _shared(prefix.get(name, tally.prompt), tally.prompt)
        tally.verdicts += _verdict(record)
        tally.places.append(place)
    if without:
        notes.append(f"samples: {without:,} records without set, problem or response are left out")
    notes[damaged:] = [f"{model.label}: {note}" for note in notes[damaged:]]
    for name, shared in prefix.items():
        whole = len(model.problems[name]) == 1
        model.prefix[name] = "" if whole else shared[: max(map(shared.rfind, " \n\t>")) + 1]


def _shared(first: str, second: str) -> str:
    """Return the beginning that two texts share."""
    if second.startswith(first):
        return first
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in same)]


def _verdict(record: dict[str, Any]) -> str:
    if record.get("failed") is not None:
        return FAILED
    score = number(record.get("score"))
    return UNGRADED if score != score else RIGHT if score >= 1 else WRONG
