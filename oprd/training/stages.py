"""Runs in several stages: each stage trains the student that the previous stage has saved.

    oprd-train --config recipes/demo_two_stages.yaml

The option ``stages`` lists the stages in order, each with the options that it changes. If the
command is started again, finished stages are skipped. With ``resume: auto``, an unfinished stage
continues from its newest checkpoint; otherwise it begins anew.
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

SECTIONS = (
    "student",
    "student.lora",
    "teacher",
    "data",
    "data.train",
    "rollout",
    "rollout.vllm",
    "distill",
    "bridge",
    "opd",
    "optim",
    "fsdp",
    "eval",
    "checkpoint",
    "watchdog",
    "watchdog.loss",
    "watchdog.length",
    "logging",
)
"""Sections that a stage's options are merged into. A stage replaces any other value as a whole."""

RECORD = "stages.json"
T = TypeVar("T")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return plain values of a configuration with the ``changes`` merged into ``base``."""
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
    """Return each stage's configuration as plain values.

    The student of every stage but the first is the one that the previous stage saves.

    Args:
        base: the options that the stages share; ``output_dir`` must be set.
        stages: by stage name, the options that the stage changes.

    Raises:
        ConfigError: if there is no ``output_dir``, or a stage sets ``output_dir`` or the path of a
            student that a previous stage saves.
    """
    if base["output_dir"] is None:
        raise ConfigError(
            "stages need an output_dir: each stage has a directory in it, and a second start "
            "continues there"
        )
    if base.get("resume") not in (None, "auto"):
        raise ConfigError(
            f"resume={base['resume']}: with stages it must be auto, because each stage has its own "
            "checkpoints"
        )
    by_stage, previous = {}, None
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
        by_stage[name], previous = values, directory
    return by_stage


def check(values: Mapping[str, dict[str, Any]], dry_run: bool = False) -> dict[str, list[str]]:
    """Check every stage before the first begins.

    A student that does not exist yet is assumed to have the configuration of the first student.

    Args:
        values: by stage name, the result of `stage_values`.

    Returns:
        By stage name, what a dry run could not check.

    Raises:
        ConfigError: for the first stage with a problem; the message names it.
    """
    first = next(iter(values.values()))["student"]
    unchecked = {}
    for name, stage in values.items():
        student = stage["student"]
        if not Path(student["path"], "config.json").exists():
            student = student | {"path": first["path"]}
        directory = Path(stage["output_dir"])
        # The stage's own directory may already hold a run, which preflight would refuse.
        probe = stage | {"student": student, "output_dir": f"{directory}.check"}
        try:
            unchecked[name] = preflight(from_values(probe), dry_run).unchecked
        except ConfigError as error:
            raise ConfigError(f"stages.{name}: {error}") from error
    return unchecked


@shown()
def run_stages(base: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Summary | None:
    """Run the stages that are not finished.

    Args:
        base: the configuration without ``stages``, as plain values.
        stages: by stage name, the options that the stage changes.

    Returns:
        The summary of the last run, or None if all stages were finished already.

    Raises:
        ConfigError: before the first run, if a check of any stage fails, or ``output_dir`` holds
            stages of another configuration.
    """
    values = stage_values(base, stages)
    check(values)
    configs = {name: from_values(stage) for name, stage in values.items()}
    limits = [cfg.watchdog.timeout_s for cfg in configs.values()]
    limit = None if None in limits else max(filter(None, limits))
    # One process group for all stages: no rank begins a stage before rank 0 has ended the last.
    distributed.init(base["device"], timeout_s=limit)
    try:
        _on_rank_0(lambda: _record_stages(Path(base["output_dir"]), configs))
        summary = None
        for name, stage in values.items():
            if not _on_rank_0(partial(_begin, name, stage)):
                continue
            summary = train(configs[name])
            if summary.interrupted:
                break
        return summary
    finally:
        distributed.shutdown()


def _on_rank_0(do: Callable[[], T]) -> T:
    """Call ``do`` on rank 0 and return its result on all ranks, or raise its error on all ranks."""
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


def _record_stages(root: Path, stages: Mapping[str, TrainConfig]) -> None:
    """Record the stages in output_dir; raise if it belongs to a different configuration."""
    record = root / RECORD
    if record.exists():
        _compare(record, stages)
    elif root.exists() and any(not file.name.startswith(RECORD) for file in root.iterdir()):
        raise ConfigError(f"output_dir {root} holds other files: choose a new directory")
    root.mkdir(parents=True, exist_ok=True)
    write_json(record, {name: settings(cfg) for name, cfg in stages.items()})


def _compare(record: Path, stages: Mapping[str, TrainConfig]) -> None:
    """Compare the recorded stages with ``stages``.

    Raises:
        ConfigError: if options differ that a resumed run may not change, or if the steps of a
            finished stage differ.
    """
    old = json.loads(record.read_text())
    changed = []
    if list(old) != list(stages):
        changed.append(f"stages: {', '.join(old)} there, {', '.join(stages)} here")
    for i, name in enumerate(name for name in old if name in stages):
        cfg, steps = stages[name], old[name]["steps"]
        if i > 0:  # the previous stage's directory; it may have been moved
            old[name]["student"]["path"] = cfg.student.path
        changed += [f"{name}: {what}" for what in differences(old[name], cfg)]
        if cfg.steps != steps and finished(record.parent / name):
            changed.append(f"{name}: steps: {steps} there, {cfg.steps} here, and it is finished")
    if changed:
        raise ConfigError(
            f"output_dir {record.parent} holds stages of another configuration ({record}): "
            f"{'; '.join(changed)}. Use its values, choose a new directory, or list the options "
            "that may differ in checkpoint.allow_changes"
        )


def _begin(name: str, stage: Mapping[str, Any]) -> bool:
    """Prepare a stage's directory; return False if the stage is finished."""
    directory = Path(stage["output_dir"])
    if finished(directory):
        logger.info(f"stage {name}: finished already, {directory}")
        return False
    left = directory.exists() and any(directory.iterdir())
    if left and stage["resume"] is None:
        aside = set_aside(directory, "unfinished")
        logger.info(f"stage {name}: the files of an unfinished run were moved to {aside}")
    logger.info(f"stage {name}")
    return True
