"""The recipe of ``oprd-paper``, ``recipe.yaml``: rows, levels, learning rates, and the
configuration of each run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from oprd.bridge.config import FitConfig
from oprd.config import TrainConfig
from oprd.config.io import made_from
from oprd.errors import ConfigError
from oprd.training.stages import merged

FILE = Path(__file__).with_name("recipe.yaml")
TEACHER = "teacher"
MOVED = ("student.path", "teacher.path", "data.train.path", "bridge.path")
"""Options that differ in a run that goes on after ``output_dir`` was moved."""


@dataclass(frozen=True)
class BridgeFit:
    """A bridge from the student's states to a teacher's.

    Attributes:
        reads: what the teacher reads, as ``teacher.reads``.
    """

    teacher: str
    rank: int
    reads: Literal["text", "student_ids"] = "text"


@dataclass(frozen=True)
class Row:
    """One way to train: a row of the tables.

    Attributes:
        name: its name in tables and figures.
        options: the options of ``oprd-train`` that it changes.
        rate: learning rate; None: that of the row ``rate_of``, or of each stage.
        teacher: name of its teacher's directory; of a row with a bridge, see ``bridge``.
        bridge: name of its bridge, which also names the teacher.
        rank: rank at which the bridge is used.
        stages: rows that train the student in turn, each for its part of the steps.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    rate_of: str | None = None
    teacher: str = TEACHER
    bridge: str | None = None
    rank: int | None = None
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """How much is run.

    Attributes:
        steps: optimizer steps of a run.
        seeds: seeds of the reported runs.
        rows: ids of the rows.
    """

    steps: int
    seeds: tuple[int, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """Directories that the recipe's paths are in."""

    models: Path
    prompts: Path
    bridges: Path

    def bridge(self, name: str) -> Path:
        """Return the file of a bridge."""
        return self.bridges / f"{name}.safetensors"

    def filled(self, value: Any) -> Any:
        """Return plain values with the directories' names filled in."""
        if isinstance(value, str):
            for name, path in vars(self).items():
                value = value.replace(f"{{{name}}}", str(path))
            return value
        if isinstance(value, Mapping):
            return {k: self.filled(v) for k, v in value.items()}
        return [self.filled(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Recipe:
    """The recipe.

    Attributes:
        base: the options of ``oprd-train`` that all rows share.
        fit: options of ``oprd-bridge fit``.
        rates: learning rates that tuned rows choose from.
        tuning_seed: seed of the runs that choose.
    """

    base: Mapping[str, Any]
    fit: Mapping[str, Any]
    levels: Mapping[str, Level]
    bridges: Mapping[str, BridgeFit]
    rows: Mapping[str, Row]
    rates: tuple[float, ...]
    tuning_seed: int

    @property
    def tuned(self) -> list[str]:
        """Ids of the rows that have a learning rate of their own."""
        return [i for i, row in self.rows.items() if row.rate is not None]

    def rate(self, row: str) -> float:
        """Return a row's learning rate."""
        found = self.rows[row]
        if found.rate is not None:
            return found.rate
        return self.rate(found.rate_of or found.stages[0])

    def teacher(self, row: str) -> str:
        """Return the name of a row's teacher."""
        found = self.rows[row]
        if found.stages:
            return self.teacher(found.stages[0])
        return found.teacher if found.bridge is None else self.bridges[found.bridge].teacher

    def bridges_of(self, row: str) -> list[str]:
        """Return the names of the bridges that a row needs."""
        found = self.rows[row]
        own = [] if found.bridge is None else [found.bridge]
        return own + [b for stage in found.stages for b in self.bridges_of(stage)]

    def rollouts(self, row: str) -> int:
        """Return the number of rollouts in a step of a row."""
        found = self.rows[row].options.get("rollout", {})
        sampling = {**self.base["rollout"], **found}
        return sampling["prompts_per_step"] * sampling["responses_per_prompt"]

    def options(self, row: str, places: Places, rate: float | None = None) -> dict[str, Any]:
        """Return the options that a row without stages changes in `shared`."""
        found, model = self.rows[row], self.teacher(row)
        own: dict[str, Any] = {
            "teacher": {"path": f"{{models}}/{model}"},
            "optim": {"lr": self.rate(row) if rate is None else rate},
        }
        if found.bridge is not None:
            own["teacher"]["reads"] = self.bridges[found.bridge].reads
            own["bridge"] = {"path": str(places.bridge(found.bridge)), "rank": found.rank}
        if model == "teacher_of_other_tokenizer":  # its head predicts other tokens
            own["logging"] = {"teacher_head": False}
        return places.filled({**found.options, **own})

    def shared(self, places: Places, level: Level, seed: int, directory: Path) -> dict[str, Any]:
        """Return all options of ``oprd-train`` as plain values, before those of a row."""
        values = json.loads(json.dumps(asdict(TrainConfig())))
        values = merged(values, places.filled(self.base))
        own = {"output_dir": str(directory), "resume": "auto", "seed": seed, "steps": level.steps}
        values["checkpoint"]["allow_changes"] = list(MOVED)
        return values | own

    def fit_config(self, bridge: str, places: Places, output: Path) -> FitConfig:
        """Return the configuration of a bridge's fit."""
        base, found = places.filled(self.base), self.bridges[bridge]
        shared = {k: base[k] for k in ("device", "autocast", "micro_batch_tokens", "data")}
        sections = {
            "student": base["student"],
            "teacher": base["teacher"]
            | {"path": str(places.models / found.teacher), "reads": found.reads},
            "rollout": {**base["rollout"], "engine": "generate"},
        }
        given = {**shared, **sections, **self.fit, "rank": found.rank, "output": str(output)}
        return made_from(FitConfig, given)


@functools.cache
def recipe() -> Recipe:
    """Read the package's recipe."""
    values = yaml.safe_load(FILE.read_text())
    rows = {
        i: Row(**row | {"stages": tuple(row.get("stages", ()))})
        for i, row in values["rows"].items()
    }
    levels = {
        name: Level(
            level["steps"],
            tuple(level["seeds"]),
            tuple(rows if level["rows"] == "all" else level["rows"]),
        )
        for name, level in values["levels"].items()
    }
    return Recipe(
        base=values["base"],
        fit=values["fit"],
        levels=levels,
        bridges={name: BridgeFit(**bridge) for name, bridge in values["bridges"].items()},
        rows=rows,
        rates=tuple(values["tuning"]["rates"]),
        tuning_seed=values["tuning"]["seed"],
    )


def check_rows(wanted: Iterable[str]) -> None:
    """Check the ids of rows.

    Raises:
        ConfigError: for an unknown one; the message lists all.
    """
    known = recipe().rows
    if unknown := [row for row in wanted if row not in known]:
        raise ConfigError(f"rows: {', '.join(unknown)} unknown; there are {', '.join(known)}")
