"""Several runs, each from the student that the one before it has left: Bridge, then OPD, say.

    oprd-train --config recipes/demo_two_stages.yaml

``stages`` names them in order, each with what it changes of the configuration. Started again, the
command goes on after the last stage that was finished; with ``resume: auto`` inside the one that
was not, from its newest checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from oprd import distributed
from oprd.atomic_files import write_json
from oprd.checkpoint.files import set_aside
from oprd.checkpoint.resume import differences, settings
from oprd.config import TrainConfig
from oprd.config.io import from_values
from oprd.errors import ConfigError
from oprd.observability.console import shown
from oprd.observability.summary import Summary, finished
from oprd.training.preflight import preflight
from oprd.training.trainer import train

logger = logging.getLogger(__name__)

SECTIONS = ("student", "student.lora", "teacher", "data", "data.train", "rollout", "rollout.vllm",
            "distill", "bridge", "opd", "optim", "fsdp", "eval", "checkpoint", "watchdog",
            "watchdog.loss", "watchdog.length", "logging")  # fmt: skip
"""Parts of the configuration of which a stage may change some entries; others it replaces."""

RECORD = "stages.json"
T = TypeVar("T")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``base`` with ``changes``, as plain values."""
    result = dict(base)
    for key, value in changes.items():
        name = f"{where}{key}"
        if name in SECTIONS and isinstance(value, Mapping):
            result[key] = merged(base[key], value, f"{name}.")
        else:
            result[key] = value
    return result


def stage_values(
    base: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each stage's configuration, as plain values. A later stage's student is the result of the one
    before.

    Args:
        base: what the stages have in common, ``output_dir`` included.

    Raises:
        ConfigError: if there is no ``output_dir``, or a stage sets what follows from the order.
    """
    if base["output_dir"] is None:
        raise ConfigError(
            "stages need an output_dir: there each has a directory, and a second start goes on"
        )
    if base.get("resume") not in (None, "auto"):
        raise ConfigError(
            f"resume={base['resume']}: with stages it must be auto, each has checkpoints of its own"
        )
    found, previous = {}, None
    for name, changes in stages.items():
        if not name or Path(name).name != name:
            raise ConfigError(f"stages: {name!r} can't be the name of a directory")
        section = changes.get("student")
        fixed = ["output_dir", *(["student.path"] if previous is not None else [])]
        given = set(changes) | {f"student.{key}" for key in section or ()}
        if taken := sorted(given.intersection(fixed)):
            raise ConfigError(f"stages.{name} sets {', '.join(taken)}, which the order decides")
        directory = Path(base["output_dir"]) / name
        values = merged(base, changes)
        values["output_dir"] = str(directory)
        if previous is not None:
            values["student"] = values["student"] | {"path": str(previous / "student")}
        found[name], previous = values, directory
    return found


def check(values: Mapping[str, dict[str, Any]], dry_run: bool = False) -> dict[str, list[str]]:
    """Check every stage before the first begins. A student that is yet to be made is taken to be
    like the first one.

    Returns:
        By stage, what a dry run could not check.

    Raises:
        ConfigError: naming the stage.
    """
    first = next(iter(values.values()))["student"]
    unchecked = {}
    for name, stage in values.items():
        student = stage["student"]
        if not Path(student["path"], "config.json").exists():
            student = student | {"path": first["path"]}
        directory = Path(stage["output_dir"])
        # The directory may hold a run, finished or not: that is not what is checked here.
        probe = stage | {"student": student, "output_dir": f"{directory}.check"}
        try:
            unchecked[name] = preflight(from_values(probe), dry_run).unchecked
        except ConfigError as error:
            raise ConfigError(f"stages.{name}: {error}") from error
    return unchecked


@shown()
def run_stages(base: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Summary | None:
    """Run what is not finished; the last run's summary, None if there was nothing left to do.

    Args:
        base: the configuration without ``stages``, as plain values.

    Raises:
        ConfigError: before the first run, if any of them could not finish, or the directory holds
            stages of another configuration.
    """
    values = stage_values(base, stages)
    check(values)
    configs = {name: from_values(stage) for name, stage in values.items()}
    limits = [cfg.watchdog.timeout_s for cfg in configs.values()]
    limit = None if None in limits else max(filter(None, limits))
    # For all of them: no rank begins a stage before rank 0 has ended the last one.
    distributed.init(base["device"], timeout_s=limit)
    try:
        _by_rank_0(lambda: _keep_record(Path(base["output_dir"]), configs))
        summary = None
        for name, stage in values.items():
            if not _by_rank_0(partial(_begin, name, stage)):
                continue
            summary = train(configs[name])
            if summary.interrupted:
                break
        return summary
    finally:
        distributed.shutdown()


def _by_rank_0(do: Callable[[], T]) -> T:
    """What rank 0's call returned, when it has. All ranks raise what it raised."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if distributed.rank() == 0:
        try:
            outcome = (do(), None)
        except (ConfigError, OSError) as error:
            outcome = (None, error)
    value, problem = distributed.from_rank_0(outcome)
    if problem is not None:
        raise problem
    return value


def _keep_record(root: Path, stages: Mapping[str, TrainConfig]) -> None:
    """Note which stages a directory is of; refuse one of others."""
    record = root / RECORD
    if record.exists():
        _compare(record, stages)
    elif root.exists() and any(not file.name.startswith(RECORD) for file in root.iterdir()):
        raise ConfigError(f"output_dir {root} holds other files: choose a new directory")
    root.mkdir(parents=True, exist_ok=True)
    write_json(record, {name: settings(cfg) for name, cfg in stages.items()})


def _compare(record: Path, stages: Mapping[str, TrainConfig]) -> None:
    """Refuses what a resumed run may not have otherwise, and other steps of a finished stage."""
    old = json.loads(record.read_text())
    found = []
    if list(old) != list(stages):
        found.append(f"stages: {', '.join(old)} there, {', '.join(stages)} here")
    for i, name in enumerate(name for name in old if name in stages):
        cfg, steps = stages[name], old[name]["steps"]
        if i > 0:  # its student is the last stage's, wherever the directory is by now
            old[name]["student"]["path"] = cfg.student.path
        found += [f"{name}: {what}" for what in differences(old[name], cfg)]
        if cfg.steps != steps and finished(record.parent / name):
            found.append(f"{name}: steps: {steps} there, {cfg.steps} here, and it is finished")
    if found:
        raise ConfigError(
            f"output_dir {record.parent} holds stages of another configuration ({record}): "
            f"{'; '.join(found)}. Take its values, choose a new directory, or name what may differ "
            "in checkpoint.allow_changes"
        )


def _begin(name: str, stage: Mapping[str, Any]) -> bool:
    """Whether a stage is to run; its directory is then ready."""
    directory = Path(stage["output_dir"])
    if finished(directory):
        logger.info(f"stage {name}: finished already, {directory}")
        return False
    left = directory.exists() and any(directory.iterdir())
    if left and stage["resume"] is None:
        aside = set_aside(directory, "unfinished")
        logger.info(f"stage {name}: what an unfinished run left is now in {aside}")
    logger.info(f"stage {name}")
    return True
