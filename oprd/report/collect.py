"""From the paths that a user names to groups of runs: what one line of a chart stands for."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oprd.errors import ConfigError
from oprd.report.boards import Board, boards, name_apart
from oprd.report.evals import Evaluation, find_evals, is_eval, read_eval
from oprd.report.read import document, mapping, number
from oprd.report.run import AFTER, TEACHER, Run, is_run, read_run

SWEEP = "sweep.json"
DEPTH = 4
"""Levels of directories below a named path in which runs are looked for."""

_OWN = ("output_dir", "name", "seed", "resume", "log_every")
_SECTIONS = ("logging.", "checkpoint.", "watchdog.")


@dataclass
class Group:
    """Runs that differ in nothing but their seed, under one label.

    Attributes:
        teacher: the teacher's accuracy by set, where known.
    """

    label: str
    runs: list[Run]
    teacher: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    def teacher_accuracy(self, name: str) -> float:
        """Return the teacher's accuracy on a set: the best one's, if there are several."""
        known = [number(self.teacher.get(name))]
        for run in self.runs:
            models = {m for m in run.final if m.startswith(TEACHER)}
            models |= {e.model for e in run.evaluations if e.model.startswith(TEACHER)}
            known += [number(run.result(model, name).get("avg")) for model in models]
        return max((x for x in known if x == x), default=float("nan"))


@dataclass
class Collection:
    """All that a report shows.

    Attributes:
        groups: the groups, in the order of their first run.
        tuning: by label of the variant, the runs that chose its learning rate (oprd-compare).
        sweeps: by label, rows of ``oprd-bridge sweep``.
        evals: directories of ``oprd-eval``.
        boards: the models of these, by set.
        headline: the set whose final accuracy is compared, None if no run was evaluated.
        sources: directories of all these, which nothing is written to.
        notes: messages about the paths as a whole.
    """

    groups: list[Group] = field(default_factory=list)
    tuning: dict[str, list[Run]] = field(default_factory=dict)
    sweeps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evals: list[Evaluation] = field(default_factory=list)
    boards: list[Board] = field(default_factory=list)
    headline: str | None = None
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def ended(self) -> bool:
        """Whether there is something, and nothing more will come."""
        done = [run.ended for run in self.runs] + [e.ended for e in self.evals]
        return bool(done) and all(done)

    @property
    def remarks(self) -> list[tuple[Path, str]]:
        """What could not be read of runs and evaluations, with their directories."""
        of_runs = [(run.directory, note) for run in self.runs for note in run.notes]
        return of_runs + [(e.directory, note) for e in self.evals for note in e.notes]

    def sets(self) -> list[str]:
        """Return the names of all evaluation sets with results of a student."""
        names = dict.fromkeys(n for run in self.runs for n in run.sets())
        return [n for n in names if any(r.curve(n) or r.result(AFTER, n) for r in self.runs)]


def find_runs(path: Path, depth: int = DEPTH) -> list[Path]:
    """Return the directories of runs at or below a path, without what a run keeps for itself."""
    if is_run(path):
        return [path]
    if depth == 0 or is_eval(path):
        return []
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for p in below if ".unfinished_" not in p.name for run in find_runs(p, depth - 1)]


def collect(paths: Sequence[Path], headline: str | None = None, wait: bool = False) -> Collection:
    """Read everything at the paths: runs, evaluations, comparisons, sweeps, directories of such.

    Args:
        headline: name of the set whose final accuracy is compared. None: the comparison's
            ``report_set``, else "test", else the last set.
        wait: accept paths that hold no run yet.

    Raises:
        ConfigError: if a path does not exist, if nothing at all was found, or if no run has the
            set ``headline``.
    """
    out = Collection()
    plain: list[Run] = []
    seen: set[Path] = set()
    evals: dict[Path, Path] = {}
    reported: str | None = None
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist: name directories of runs")
        if path.name == SWEEP or (path / SWEEP).is_file():
            _add_sweep(out, path if path.is_file() else path / SWEEP)
            out.sources.append(path.parent if path.is_file() else path)
            continue
        if not path.is_dir():
            raise ConfigError(f"{path} is a file: name the run's directory")
        try:
            found, evaluated = find_runs(path), find_evals(path, DEPTH)
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
        fresh = [p for p in found if p.resolve() not in seen]
        seen |= {p.resolve() for p in found}
        out.sources += [*found, *evaluated]
        evals |= {p.resolve(): p for p in evaluated if p.resolve() not in evals}
        if len(fresh) < len(found):
            out.notes.append(f"{path}: runs that were named twice are shown once")
        if not found and not evaluated:
            out.notes.append(
                f"{path} holds no run yet: a run has a metrics.jsonl or a config.yaml, an "
                "evaluation a results.json"
            )
        elif "variants" in (comparison := document(path / "config.json", out.notes)):
            reported = reported or comparison.get("report_set")
            out.sources.append(path)
            _add_comparison(out, path, comparison, [p for p in fresh if p.parent != path])
        else:
            plain += [read_run(p) for p in fresh]
    out.groups += _by_settings(plain)
    out.evals = [read_eval(p) for p in evals.values()]
    name_apart(out.evals)
    out.boards = boards(out.evals)
    if not out.groups and not out.sweeps and not out.evals and not wait:
        raise ConfigError("; ".join(out.notes) or "no run has written anything yet")
    _name_apart(out.groups)
    out.headline = _headline(out, headline, reported)
    return out


def _headline(out: Collection, asked: str | None, reported: str | None) -> str | None:
    names = out.sets()
    if asked is not None and names and asked not in names:
        raise ConfigError(f"no run was evaluated on a set {asked!r}, only on {names}")
    return next((n for n in (asked, reported, "test") if n in names), names[-1] if names else None)


def _add_sweep(out: Collection, file: Path) -> None:
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        out.notes.append(f"{file} could not be read: {error}")
        return
    good = [r for r in rows if number(mapping(r).get("rank")) > 0] if isinstance(rows, list) else []
    if good:
        out.sweeps[str(file.parent.name)] = sorted(good, key=lambda r: r["rank"])
    else:
        out.notes.append(f"{file} holds no ranks: it is not of oprd-bridge sweep")


def _add_comparison(
    out: Collection, path: Path, comparison: dict[str, Any], found: list[Path]
) -> None:
    """Add the runs of ``oprd-compare``: one group a variant, of its chosen learning rate."""
    report = mapping(document(path / "compare.json", out.notes).get("variants"))
    teacher = {k: number(v) for k, v in document(path / "teacher.json", out.notes).items()}
    tuning_seed = comparison.get("tuning_seed")
    by_slug: dict[str, list[Run]] = {}
    for p in found:
        by_slug.setdefault(p.parent.name, []).append(read_run(p))
    for name in mapping(comparison["variants"]):
        runs = by_slug.pop("".join(c if c.isalnum() else "_" for c in name), [])
        rate = mapping(report.get(name)).get("lr")
        chosen = [r for r in runs if rate is None or r.config.get("optim.lr") == rate]
        shown = [r for r in chosen if r.seed != tuning_seed] or chosen
        tuning = [r for r in runs if r.seed == tuning_seed]
        if rate is None and shown:
            out.notes.append(f"{path}: the learning rate of {name} is not chosen yet")
            for group in _by_settings(shown):
                lr = group.config.get("optim.lr")
                out.groups.append(Group(f"{name}, lr {lr}", group.runs, teacher))
        elif shown:
            out.groups.append(Group(name, shown, teacher))
        if len({str(r.config.get("optim.lr")) for r in tuning}) > 1:
            out.tuning[name] = tuning
    for runs in by_slug.values():
        out.groups += _by_settings(runs)


def compared_settings(run: Run) -> dict[str, Any]:
    """Return the settings that make two runs different: not their names, seeds and log files."""
    return {k: v for k, v in run.config.items() if k not in _OWN and not k.startswith(_SECTIONS)}


def _by_settings(runs: Sequence[Run]) -> list[Group]:
    """Join runs that differ only in their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(compared_settings(run), sort_keys=True, default=str)
        members = groups.setdefault(key if run.config else str(run.directory), [])
        members.append(run)
    out = []
    for members in groups.values():
        seeds = [str(r.seed) for r in members]
        if len(set(seeds)) == len(seeds):
            out.append(Group(_common_name([r.name for r in members]), members))
        else:
            out += [Group(r.name, [r]) for r in members]
    return out


def _common_name(names: list[str]) -> str:
    if len(set(names)) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    stem = "".join(letters[0] for letters in same).rstrip(" ,-_.0123456789")
    return stem.removesuffix("seed").rstrip(" ,-_.") or names[0]


def _name_apart(groups: list[Group]) -> None:
    """Add their directories to labels that are not unique."""
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        by_label.setdefault(group.label, []).append(group)
    for same in by_label.values():
        if len(same) > 1:
            paths = [g.runs[0].directory.resolve() for g in same]
            shared = Path(os.path.commonpath([str(p) for p in paths]))
            for group, path in zip(same, paths, strict=True):
                group.label += f" ({path.relative_to(shared)})"
