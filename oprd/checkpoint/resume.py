"""Where a run goes on: which checkpoint, whether it is of this run, and the files beyond it."""

from __future__ import annotations

import json
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

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
FREE = (
    *("output_dir", "name", "device", "steps", "log_every", "checkpoint", "resume", "eval"),
    *("micro_batch_tokens", "rollout.batch_size"),
    *("student.gradient_checkpointing", "distill.backend"),
    *("opd.implementation", "opd.chunk_tokens", "student.compile", "fsdp.mode", "fsdp.teacher"),
    *("fsdp.reshard_after_forward", "fsdp.shard_size", "fsdp.cpu_offload", "packing"),
    *("rollout.engine", "rollout.vllm", "watchdog", "logging"),
)
"""Settings, or sections, that a resumed run may have otherwise, besides attn_implementation: they
decide where and how it is computed and what is shown. ``steps`` too: the schedule of the learning
rate is then the new one."""


@dataclass
class Candidates:
    """What a run could go on from.

    Attributes:
        checkpoints: that look whole, the newest first; none: it begins at the beginning.
        torn: what is wrong with others.
        notes: what the user should know.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    torn: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_run(directory: Path) -> bool:
    """Whether a run has written into a directory."""
    return any((directory / name).exists() for name in (METRICS, CHECKPOINTS))


def locate(path: str | Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints that a path means, newest first: one, or those of a run's directory; and what
    is wrong with others there.

    Raises:
        ConfigError: if there is nothing there, or none of them is whole.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        found, torn = files.find(path / CHECKPOINTS)
    elif files.NAME.fullmatch(path.name) or (path / files.DOCUMENT).exists():
        try:
            found, torn = [files.read(path)], {}
        except Torn as error:
            found, torn = [], {path: str(error)}
    else:
        found, torn = [], {}
    if not found:
        why = "; ".join(f"{p.name}: {reason}" for p, reason in torn.items())
        raise ConfigError(
            f"no whole checkpoint at {path}{f' ({why})' if why else ''}: expected a run's directory"
            " with checkpoints/step_.. in it, or one of those"
        )
    return found, torn


def find_candidates(cfg: TrainConfig, directory: Path) -> Candidates:
    """What ``cfg.resume`` asks to go on from, compared with the configuration.

    Args:
        directory: the run's.

    Raises:
        ConfigError: if there is nothing where something must be, or it is of another run.
    """
    if cfg.resume is None:
        return Candidates()
    if cfg.resume == "auto":
        found, torn = files.find(directory / CHECKPOINTS)
        if torn and not found:
            locate(directory)
    else:
        found, torn = locate(cfg.resume)
    candidates = Candidates(found, torn)
    candidates.notes += [f"{p} is not whole and left out: {why}" for p, why in torn.items()]
    if found:
        candidates.notes += _check_settings(cfg, found[0])
    return candidates


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(asdict(cfg)))


def differences(old: Mapping[str, Any], cfg: TrainConfig) -> list[str]:
    """What differs between a checkpoint's settings and a configuration and must not, by dotted
    name with both values. An option that the checkpoint's version did not have was at its default.
    """
    ours = _flat(settings(cfg))
    theirs = _flat(old)
    defaults = _flat(settings(TrainConfig()) | {"objectives": {}})  # of which all are named
    free = (*FREE, *cfg.checkpoint.allow_changes)
    differing = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name.endswith(".attn_implementation") or any(
            name == f or name.startswith(f"{f}.") for f in free
        ):
            continue
        was = theirs.get(name, defaults.get(name))
        if was != ours.get(name):
            differing.append(f"{name}: {was!r} there, {ours.get(name)!r} here")
    return differing


def same_evaluation(old: Mapping[str, Any], cfg: TrainConfig) -> bool:
    """Whether a checkpoint's evaluations are what a configuration's would be: of sets that are
    called alike, sampled and graded alike. An option that its version did not have was at its
    default."""

    defaults = settings(TrainConfig())["eval"]

    def meaning(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        values = {k: v for k, v in defaults.items() if k not in evaluation} | dict(evaluation)
        sets = {n: {k: v for k, v in s.items() if k != "every"} for n, s in values["sets"].items()}
        free = ("batch_size", "teacher", "sets")
        return {k: v for k, v in values.items() if k not in free} | {"sets": sets}

    return meaning(old["eval"]) == meaning(settings(cfg)["eval"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_settings(cfg: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """Raises where a run would become another one; returns notes."""
    old = checkpoint.document["settings"]
    if differing := differences(old, cfg):
        raise ConfigError(
            f"the checkpoint {checkpoint.path} is of a run with other settings: "
            f"{'; '.join(differing)}. Take its values, begin in a new output_dir, or name what may "
            "differ in checkpoint.allow_changes"
        )
    if checkpoint.step > cfg.steps:
        raise ConfigError(
            f"the checkpoint {checkpoint.path} has made {checkpoint.step} steps already, more than "
            f"steps={cfg.steps}: raise it, or resume from an earlier checkpoint"
        )
    if old["steps"] != cfg.steps:
        return [
            f"steps was {old['steps']} and is {cfg.steps}: from step {checkpoint.step + 1} on the "
            "learning rate follows the schedule of the new one"
        ]
    return []


def choose(candidates: Candidates, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest candidate whose files have the checksums that they were written with; None if
    there was none to begin with. Collective: each rank reads a share of the files.

    Raises:
        ConfigError: if all of them are damaged.
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
        found = [p for p in problems if p is not None]
        if not found:
            return checkpoint
        candidates.torn[checkpoint.path] = found[0]
        say(f"{checkpoint.path} is damaged and left out: {found[0]}")
    if candidates.checkpoints:
        raise ConfigError(
            f"all {len(candidates.checkpoints)} checkpoints are damaged ({candidates.torn}): begin "
            "in a new output_dir"
        )
    return None


def tidy(directory: Path, checkpoint: Checkpoint | None, candidates: Candidates) -> list[str]:
    """Make a run's directory what it was when the checkpoint was written; rank 0 only. What came
    later is renamed, not deleted.

    Returns:
        What was renamed, for the user.
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
        notes.append(f"what {METRICS} held of later steps is now in {rest.name}")
    return notes


def write_config(directory: Path, cfg: TrainConfig) -> None:
    """Write a run's configuration to ``config.yaml``; one that says something else is kept under
    another name."""
    file, content = directory / "config.yaml", to_yaml(cfg).encode()
    if file.exists() and file.read_bytes() != content:
        files.set_aside(file, "before")
    write_whole(file, content)


def cut(file: Path, size: int) -> Path | None:
    """Move all but the first ``size`` bytes of a file into another one; returns that, if any."""
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
