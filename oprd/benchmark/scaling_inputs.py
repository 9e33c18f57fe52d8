"""What ``oprd-scaling`` reads: the measured parts of a step, and what its models send."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from oprd.benchmark.scaling import Measured, Model, Scaling, Traffic
from oprd.config import TrainConfig
from oprd.config.io import from_values
from oprd.distill.objectives import REP
from oprd.errors import ConfigError
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from oprd.memory_plan.report import shapes
from oprd.memory_plan.run import adapter_parameters, make_training_plan
from oprd.memory_plan.shapes import DTYPE_BYTES, FLOAT32, Shape
from oprd.models.layer_pairs import pair_layers

WARM_UP = 2
"""Steps of a run that are left out: allocators, caches and compilers warm up."""
TEACHER, UPDATE, SYNC = (
    f"time/{phase}_s" for phase in ("teacher", "student_update", "weight_sync")
)
NEEDED = (
    TEACHER,
    UPDATE,
    "perf/optimizer_s",
    "perf/ranks",
    "perf/micro_batches",
    "response_length/mean",
)


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        about: lines for the table of assumptions: what was measured, on what.
        cfg, shapes: of a run, for its memory plan; None: it was ``gains.json``.
    """

    model: Model
    about: list[tuple[str, str]]
    cfg: TrainConfig | None = None
    shapes: tuple[Shape, dict[str, Shape]] | None = None

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """Weak and strong; of ``gains.json``, which is of a micro-batch and no step, weak alone."""
        return ("weak",) if self.cfg is None else ("weak", "strong")

    def memory(self, gpus: int, sequences: int) -> int | None:
        """Return the bytes that the memory plan says each of ``gpus`` needs.

        Args:
            sequences: sequences of a step on all of them.
        """
        if self.cfg is None or self.shapes is None:
            return None
        rollout = self.cfg.rollout
        prompts = max(1, sequences // rollout.responses_per_prompt)
        cfg = replace(self.cfg, rollout=replace(rollout, prompts_per_step=prompts))
        return make_training_plan(cfg, *self.shapes, gpus).total


def read(path: Path, objective: str, checkpointing: str) -> Source:
    """Read a run's directory, or the report of ``oprd-gains``.

    Args:
        objective, checkpointing: what to read of a report.

    Raises:
        ConfigError: if it is neither, or lacks what is needed; the message says what.
    """
    if path.is_dir() and (path / "metrics.jsonl").exists():
        return _run(path)
    file = path / "gains.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(
            f"{path} holds no measurement: name the directory of a run (with its metrics.jsonl) or "
            "of a report of oprd-gains (with its gains.json; a report of --step has none)"
        )
    try:
        report = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is neither the directory of a run with its metrics.jsonl nor the gains.json "
            f"of oprd-gains: {error}"
        ) from error
    return _gains(file, report, objective, checkpointing)


# A run ------------------------------------------------------------------------------------------


def _run(directory: Path) -> Source:
    try:
        cfg = from_values(yaml.safe_load((directory / "config.yaml").read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{directory} has no config.yaml: {error}") from error
    steps = _steps(directory / "metrics.jsonl")
    student, teachers = shapes(cfg, PlanConfig())
    ranks = int(_middle(steps, "perf/ranks"))
    optimizer = _middle(steps, "perf/optimizer_s")
    sync = [s[SYNC] for s in steps if SYNC in s]
    measured = Measured(
        ranks=ranks,
        sequences=cfg.rollout.prompts_per_step * cfg.rollout.responses_per_prompt,
        tokens=_middle(steps, "response_length/mean"),
        micro_batches=int(_middle(steps, "perf/micro_batches")),
        teacher=_middle(steps, TEACHER),
        update=_middle(steps, UPDATE) - optimizer,
        optimizer=optimizer,
        sync=median(sync) if sync else None,
        forward_share=forward_share(_recomputed(cfg, student)),
    )
    ours, theirs = traffic(cfg, student, teachers, sharded=cfg.fsdp.mode != "never")
    about = [
        (
            "measured",
            f"{directory}: medians of {len(steps)} steps on {ranks} rank{'s' * (ranks > 1)}",
        ),
        (
            "its step",
            f"{measured.sequences} sequences of {measured.tokens:,.0f} sampled tokens, "
            f"{measured.micro_batches} micro-batches a rank",
        ),
    ]
    beside = cfg.rollout.staleness > 0
    model = Model(measured, ours, theirs, cfg.fsdp.shard_size, samples_beside=beside)
    return Source(model, about, cfg, (student, teachers))


def _steps(file: Path) -> list[dict[str, Any]]:
    steps = []
    for line in file.read_text("utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # the run is writing it
            continue
        if UPDATE in found:
            steps.append(found)
    steps = steps[WARM_UP:] or steps
    if not steps:
        raise ConfigError(f"{file} has no steps yet: let the run make a few")
    missing = [name for name in NEEDED if name not in steps[-1]]
    if missing:
        raise ConfigError(
            f"{file} does not record {', '.join(missing)}: an earlier version wrote it. Measure "
            "again, a few steps are enough"
        )
    return steps


def _middle(steps: list[dict[str, Any]], name: str) -> float:
    return float(median(step[name] for step in steps if name in step))


def _recomputed(cfg: TrainConfig, student: Shape) -> float:
    """Return the share of the blocks that are recomputed; of ``auto`` the most."""
    option = cfg.student.gradient_checkpointing
    if isinstance(option, bool) or option == "auto":
        return float(bool(option))
    return min(option, student.layers) / student.layers


def forward_share(recomputed: float) -> float:
    """Return the forward's share of an update, whose backward takes twice as long as it.

    Args:
        recomputed: share of the blocks whose forward is repeated in backward.
    """
    return 1 / (3 + recomputed)


def traffic(
    cfg: TrainConfig, student: Shape, teachers: dict[str, Shape], sharded: bool
) -> tuple[Traffic, Traffic]:
    """Return what the student and the largest teacher send in one micro-batch.

    Args:
        sharded: FSDP2 shards the models where there is more than one rank.
    """
    fsdp = cfg.fsdp
    has_logits = any(name != REP for name in cfg.objectives)
    stored = DTYPE_BYTES[cfg.student.dtype]
    gathered = DTYPE_BYTES[fsdp.param_dtype] if fsdp.param_dtype else stored
    reduced = DTYPE_BYTES[fsdp.reduce_dtype] if sharded else stored
    tables = student.vocab * student.d
    if cfg.student.lora.rank is None:
        block_gradients = student.block_parameters * reduced
        # Losses on hidden states give an untied head no gradient.
        root_gradients = (2 if has_logits and not student.tied else 1) * tables * reduced
    else:
        adapter = adapter_parameters(student, cfg.student.lora)
        block_gradients, root_gradients = adapter * reduced // student.layers, 0
    ours = Traffic(
        blocks=student.layers,
        block=student.block_parameters * gathered,
        root=(1 if student.tied else 2) * tables * gathered,
        again=fsdp.reshard_after_forward,
        block_gradients=block_gradients,
        root_gradients=root_gradients,
        is_sharded=sharded,
    )
    theirs = []
    for name, teacher in cfg.all_teachers.items():
        shape = teachers[name]
        if teacher.shares_student:
            theirs.append(replace(ours, block_gradients=0, root_gradients=0))
            continue
        wide = DTYPE_BYTES[fsdp.param_dtype or teacher.dtype]
        blocks, heads = shape.layers, 1 if shape.tied else 2
        if not has_logits:
            pairs = pair_layers(cfg.distill.layers, student.layers, shape.layers)
            blocks, heads = max(block for _, block in pairs) + 1, 1
        theirs.append(
            Traffic(
                blocks=blocks,
                block=shape.block_parameters * wide,
                root=heads * shape.vocab * shape.d * wide,
                is_sharded=sharded and fsdp.teacher != "replicated",
            )
        )
    return ours, max(theirs, key=lambda t: t.blocks * t.block + t.root)


# The report of oprd-gains -----------------------------------------------------------------------


def _gains(file: Path, report: dict[str, Any], objective: str, checkpointing: str) -> Source:
    modes = report.get("modes", {})
    if "machine" not in report or not modes:
        raise ConfigError(
            f"{file} holds no measurement: it must be the gains.json that oprd-gains writes to "
            "--output_dir, without --dry_run"
        )
    rows = {row["objective"]: row for row in modes.get(checkpointing, ())}
    if objective not in rows:
        known = ", ".join(f"{name} ({mode})" for mode in modes for name in _names(modes[mode]))
        raise ConfigError(
            f"{file} has no {objective!r} with gradient_checkpointing={checkpointing}; it has "
            f"{known}"
        )
    row, cfg, shape = rows[objective], report["config"], Shape(**report["shape"])
    if row["teacher_forward_seconds"] is None:
        raise ConfigError(f"{objective} has no teacher: choose an objective that trains a student")
    parts = row["parts"]
    backward = sum(seconds for part, seconds in parts.items() if "backward" in part)
    measured = Measured(
        ranks=1,
        sequences=cfg["batch"],
        tokens=cfg["tokens"] - cfg["prompt"],
        micro_batches=1,
        teacher=row["teacher_forward_seconds"],
        update=row["seconds"],
        forward_share=1 - backward / sum(parts.values()),
    )
    wide = DTYPE_BYTES[cfg["dtype"]]
    needs_head = PLANNER_OBJECTIVES[objective].loss is not None
    tables = 1 if shape.tied else 2
    size = shape.vocab * shape.d
    ours = Traffic(
        blocks=shape.layers,
        block=shape.block_parameters * wide,
        root=tables * size * wide,
        block_gradients=shape.block_parameters * FLOAT32,
        root_gradients=(tables if needs_head else 1) * size * FLOAT32,
    )
    teacher = shape
    if cfg["teacher"]["path"] is not None:
        from oprd.models.loading import load_config

        teacher = Shape.of(load_config(cfg["teacher"]["path"]))
    theirs = Traffic(
        blocks=teacher.layers,
        block=teacher.block_parameters * wide,
        root=(2 if needs_head and not teacher.tied else 1) * teacher.vocab * teacher.d * wide,
    )
    about = [
        ("measured", f"{file}: {objective}, checkpointing {checkpointing}"),
        ("on", f"{report['machine']['device']}, torch {report['machine']['torch']}"),
        (
            "its step",
            f"one micro-batch of {cfg['batch']} x {cfg['tokens']} tokens, {cfg['dtype']}; no "
            "optimizer, no weight sync",
        ),
        ("FSDP", f"all ranks share one copy; gathered in {cfg['dtype']}, summed in float32"),
    ]
    return Source(Model(measured, ours, theirs), about)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["objective"] for row in rows]
