"""Resuming a run: choose a checkpoint, check its settings, set later files aside."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from oprd import distributed
from oprd.atomic_files import write_whole
from oprd.checkpoint import files
from oprd.checkpoint.files import Checkpoint, Torn, newest
from oprd.config import TrainConfig
from oprd.config.io import to_yaml
from oprd.errors import ConfigError
from oprd.observability.summary import Summary, read_summary

logger = logging.getLogger(__name__)

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
FREE = (
    *("output_dir", "name", "device", "steps", "log_every", "checkpoint", "resume", "eval"),
    *("micro_batch_tokens", "rollout.batch_size"),
    *("student.gradient_checkpointing", "distill.backend", "optim.fused"),
    *("opd.implementation", "opd.chunk_tokens", "fsdp.mode", "fsdp.teacher"),
    *("fsdp.reshard_after_forward", "fsdp.shard_size", "fsdp.cpu_offload", "packing", "overlap"),
    *("rollout.engine", "rollout.vllm", "watchdog", "logging"),
)
"""Settings and sections that may differ when a run is resumed, besides attn_implementation. They
decide where and how the run is computed and what is shown. ``steps`` may differ too; the learning
rate then follows the schedule of the new value."""


@dataclass
class Candidates:
    """The checkpoints that a run could resume from.

    Attributes:
        checkpoints: those with all files at the right sizes, newest first. If empty, the run starts
            from step 0.
        torn: for each other checkpoint, the reason why it can't be used.
        notes: messages for the user.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    torn: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_run(directory: Path) -> bool:
    """Return whether a run has written into a directory."""
    return any((directory / name).exists() for name in (METRICS, CHECKPOINTS))


def locate(path: str | Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Find the checkpoints at a path: a single checkpoint, or a run's directory.

    Returns:
        The checkpoints that `files.read` accepts, newest first, and for each other one the reason
        why it is rejected.

    Raises:
        ConfigError: if there is no checkpoint at the path, or none is complete.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        checkpoints, torn = files.find(path / CHECKPOINTS)
    elif files.NAME.fullmatch(path.name) or (path / files.DOCUMENT).exists():
        try:
            checkpoints, torn = [files.read(path)], {}
        except Torn as error:
            checkpoints, torn = [], {path: str(error)}
    else:
        checkpoints, torn = [], {}
    if not checkpoints:
        why = "; ".join(f"{p.name}: {reason}" for p, reason in torn.items())
        raise ConfigError(
            f"no whole checkpoint at {path}{f' ({why})' if why else ''}: expected a run's directory"
            " that contains checkpoints/step_.., or one such checkpoint"
        )
    return checkpoints, torn


def find_candidates(cfg: TrainConfig, directory: Path) -> Candidates:
    """Find the checkpoints that ``cfg.resume`` names and compare the newest with ``cfg``.

    Args:
        directory: the run's directory.

    Raises:
        ConfigError: if a required checkpoint is missing, or if it belongs to a run with other
            settings.
    """
    if cfg.resume is None:
        return Candidates()
    if cfg.resume == "auto":
        checkpoints, torn = files.find(directory / CHECKPOINTS)
        if torn and not checkpoints:
            locate(directory)
    else:
        checkpoints, torn = locate(cfg.resume)
    candidates = Candidates(checkpoints, torn)
    candidates.notes += [f"{p} is not whole and left out: {why}" for p, why in torn.items()]
    if checkpoints:
        candidates.notes += _check_settings(cfg, checkpoints[0])
    return candidates


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """Return a configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(cfg)))


def differences(old: Mapping[str, Any], cfg: TrainConfig) -> list[str]:
    """List the settings that differ from a checkpoint's although they must not.

    An option that the checkpoint's version of oprd did not have counts as its default.

    Returns:
        For each such setting, its dotted name with both values.
    """
    ours = _flat(settings(cfg))
    theirs = _flat(old)
    defaults = _flat(settings(TrainConfig()) | {"objectives": {}})  # every objective is named
    free = (*FREE, *cfg.checkpoint.allow_changes)
    differing = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name.endswith((".attn_implementation", ".liger", ".compile")) or any(
            name == f or name.startswith(f"{f}.") for f in free
        ):
            continue
        was = theirs.get(name, defaults.get(name))
        if was != ours.get(name):
            differing.append(f"{name}: {was!r} there, {ours.get(name)!r} here")
    return differing


def same_evaluation(old: Mapping[str, Any], cfg: TrainConfig) -> bool:
    """Return whether a configuration would evaluate as the checkpoint's run did.

    The sets must have the same names and be sampled and graded in the same way. An option that the
    checkpoint's version of oprd did not have counts as its default.
    """

    defaults = settings(TrainConfig())["eval"]

    def meaning(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        values = {k: v for k, v in defaults.items() if k not in evaluation} | dict(evaluation)
        sets = {n: {k: v for k, v in s.items() if k != "every"} for n, s in values["sets"].items()}
        free = ("batch_size", "before", "teacher", "sets", "keep_samples")
        return {k: v for k, v in values.items() if k not in free} | {"sets": sets}

    return meaning(old["eval"]) == meaning(settings(cfg)["eval"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _check_settings(cfg: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """Raise if the settings differ where they must not; return notes for the user."""
    old = checkpoint.document["settings"]
    if differing := differences(old, cfg):
        raise ConfigError(
            f"the checkpoint {checkpoint.path} is of a run with other settings: "
            f"{'; '.join(differing)}. Use its values, choose a new output_dir, or list what "
            "may differ in checkpoint.allow_changes"
        )
    if checkpoint.step > cfg.steps:
        raise ConfigError(
            f"the checkpoint {checkpoint.path} has made {checkpoint.step} steps already, more than "
            f"steps={cfg.steps}: raise steps, or resume from an earlier checkpoint"
        )
    if old["steps"] != cfg.steps:
        return [
            f"steps was {old['steps']} and is {cfg.steps}: from step {checkpoint.step + 1} on the "
            "learning rate follows the new schedule"
        ]
    return []


def choose(candidates: Candidates, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest candidate whose files match their checksums; None without candidates.

    Collective: each rank reads a share of the files.

    Raises:
        ConfigError: if all candidates are damaged.
    """
    for checkpoint in candidates.checkpoints:
        names = sorted(checkpoint.document["files"])
        problems: list[str | None] = [None]
        try:
            files.verify(checkpoint, names[distributed.rank() :: distributed.world_size()])
        except (OSError, Torn) as error:
            problems = [str(error)]
        if dist.is_initialized():
            own, problems = problems[0], [None] * dist.get_world_size()
            dist.all_gather_object(problems, own)
        damage = next((p for p in problems if p is not None), None)
        if damage is None:
            return checkpoint
        candidates.torn[checkpoint.path] = damage
        say(f"{checkpoint.path} is damaged and left out: {damage}")
    if candidates.checkpoints:
        raise ConfigError(
            f"all {len(candidates.checkpoints)} checkpoints are damaged ({candidates.torn}): "
            "choose a new output_dir"
        )
    return None


def tidy(directory: Path, checkpoint: Checkpoint | None, candidates: Candidates) -> list[str]:
    """Restore a run's directory to its state when the checkpoint was written; rank 0 only.

    Later files are renamed, not deleted.

    Returns:
        A message for the user about each renamed file.
    """
    notes = []
    checkpoints = directory / CHECKPOINTS
    files.remove_unfinished(checkpoints)
    aside = [(p, "torn") for p in candidates.torn if p.parent == checkpoints]
    step = -1 if checkpoint is None else checkpoint.step
    later = [c.path for c in files.find(checkpoints)[0] if c.step > step]
    aside += [(p, "discarded") for p in later if p not in candidates.torn]
    for path, label in aside:
        notes.append(f"{path} is now {files.set_aside(path, label).name}")
    kept = 0
    if checkpoint is not None and checkpoint.path.parent.absolute() == checkpoints.absolute():
        kept = checkpoint.document["metrics_bytes"]
    if (rest := cut(directory / METRICS, kept)) is not None:
        notes.append(f"the lines of {METRICS} from later steps are now in {rest.name}")
    return notes


def write_config(directory: Path, cfg: TrainConfig) -> None:
    """Write a run's configuration to ``config.yaml``.

    An existing file with other content is kept under another name.
    """
    file, content = directory / "config.yaml", to_yaml(cfg).encode()
    if file.exists() and file.read_bytes() != content:
        files.set_aside(file, "before")
    write_whole(file, content)


def cut(file: Path, size: int) -> Path | None:
    """Move all but the first ``size`` bytes of a file to a new file; return its path, if any."""
    if not file.exists() or file.stat().st_size <= size:
        return None
    number = 1
    while (other := file.with_name(f"{file.name}.discarded-{number}")).exists():
        number += 1
    with file.open("r+b") as stream:
        stream.seek(size)
        write_whole(other, stream.read())
        stream.truncate(size)
    return other


def done_already(cfg: TrainConfig, directory: Path) -> Summary | None:
    """Return the summary of the run in a directory if it finished after ``cfg.steps`` steps.

    Raises:
        ConfigError: if the run finished after another number of steps and left no checkpoint to
            resume from.
    """
    summary = read_summary(directory)
    if summary is None or summary.interrupted:
        return None
    if summary.steps == cfg.steps:
        logger.info(f"finished already: {summary.student}")
        return summary
    if newest(directory / CHECKPOINTS) is None:
        raise ConfigError(
            f"output_dir {directory} holds a run that ended after {summary.steps} steps and kept "
            f"no checkpoint to resume from, but steps={cfg.steps}: choose a new directory"
        )
    return None
