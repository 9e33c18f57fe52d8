"""``oprd-gains``: time and memory of the actor update by objective, measured and predicted."""

from __future__ import annotations

import json
from typing import Any

import torch

from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains_plan import (
    MODE_TITLES,
    check,
    check_memory,
    make_plan,
    model_config,
    shape_of,
)
from oprd.distributed.device import check_device
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from oprd.memory_plan.shapes import Shape
from oprd.models.recompute import recompute_blocks
from oprd.output_paths import check_output_dir


def build_student(cfg: GainsConfig, config: Any, device: torch.device) -> Any:
    """Make the student, with random weights unless ``student.path`` is set."""
    from transformers import AutoModelForCausalLM

    from oprd.config import StudentConfig
    from oprd.models.loading import load_model

    if cfg.student.path is not None:
        return load_model(StudentConfig(path=cfg.student.path, dtype=cfg.dtype), device)
    torch.manual_seed(cfg.seed)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype)).to(device)


def measure(
    cfg: GainsConfig,
    student: Any,
    teacher: Any,
    blocks: dict[str, dict[str, int]],
    console: Any,
) -> dict:
    """Measure every objective in rounds: the first for memory and warm-up, the others for time.

    Args:
        blocks: the number of recomputed blocks of each objective, by mode.

    Returns:
        For each mode the `Measured` of every objective. Under ``teacher``, the
        seconds of the teacher's forward, by the kind of its outputs (see
        `Objective.teacher_outputs`).
    """
    from oprd.benchmark.update import ActorUpdate, Measured
    from oprd.observability.memory import freed_at_once

    chosen = cfg.chosen()
    actor = ActorUpdate(
        student,
        teacher,
        batch=cfg.batch,
        tokens=cfg.tokens,
        prompt=cfg.prompt,
        k=cfg.k,
        rank=cfg.rank,
        chunk=cfg.chunk,
        with_logits=any(PLANNER_OBJECTIVES[name].is_materialised for name in chosen),
        with_bridge="bridge" in chosen,
        seed=cfg.seed,
    )
    wanted = sorted({kind for name in chosen if (kind := PLANNER_OBJECTIVES[name].teacher_outputs)})
    measured: dict[str, Any] = {"teacher": {kind: [] for kind in wanted}}
    for mode in cfg.modes:
        results = {o: Measured() for o in chosen}
        measured[mode] = results
        for round_ in range(cfg.rounds + 1):
            named = f"{MODE_TITLES[mode]}, round {round_} of {cfg.rounds}"
            for objective in chosen:
                console.print(f"{named}: {PLANNER_OBJECTIVES[objective].title}")
                recompute_blocks(student, blocks[mode][objective])
                if round_ == 0:
                    with freed_at_once():
                        results[objective].delta_peaks.append(actor.measure(objective).delta_peak)
                else:
                    results[objective].add(actor.measure(objective))
            if round_ > 0:
                for kind in wanted:
                    measured["teacher"][kind].append(actor.teacher_seconds(kind))
    return measured


def run(cfg: GainsConfig, command: str, dry_run: bool, as_json: bool = False) -> None:
    """Predict, and unless ``dry_run`` also measure; print the results and write the report.

    Args:
        command: the command line, for the report.
        as_json: print the report as JSON, and nothing else to stdout, instead of tables.

    Raises:
        ConfigError: if a setting is wrong, the models don't fit together or memory is too small.
    """
    from rich.console import Console

    from oprd.benchmark import gains_tables
    from oprd.benchmark import report as gains_report
    from oprd.observability import tables
    from oprd.observability.memory import available_bytes

    cfg = cfg.with_shape()
    check(cfg, dry_run)
    console = Console(highlight=False)
    config = model_config(cfg)
    shape = shape_of(config, "student")
    theirs = teacher_shape(cfg, config)
    device = check_device(cfg.device)
    plan = make_plan(cfg, shape, theirs, device.type == "cuda")
    if dry_run:
        if as_json:
            print(json.dumps(gains_report.predictions(cfg, command, shape, plan), indent=1))
            return
        shown = [*gains_tables.prediction_tables(cfg, shape, plan), gains_tables.paper_table()]
        tables.show(console, shown)
        return
    if cfg.output_dir is not None:
        check_output_dir(cfg.output_dir, gains_report.FILES)
    check_memory(plan, available_bytes(device))
    student, teacher = build_student(cfg, config, device), load_teacher(cfg, device)
    stderr = Console(stderr=True, highlight=False)
    measured = measure(cfg, student, teacher, plan.blocks, stderr)
    report = gains_report.make_report(cfg, command, device, shape, plan, measured)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        for mode in report["modes"]:
            tables.show(console, gains_tables.measured_tables(report, mode))
    gains_report.write_report(report, cfg.output_dir)


def teacher_shape(cfg: GainsConfig, student_config: Any) -> Shape | None:
    """Return the shape of the teacher; None if it shares the student's weights.

    Raises:
        ConfigError: if the teacher does not go with the student.
    """
    from oprd.models.compatibility import check_pair
    from oprd.models.loading import load_config

    if cfg.teacher.path is None:
        return None
    config = load_config(cfg.teacher.path)
    check_pair(student_config, config, "all")
    return shape_of(config, "teacher")


def load_teacher(cfg: GainsConfig, device: torch.device) -> Any:
    """Load the teacher; None if it shares the student's weights."""
    from oprd.config import TeacherConfig
    from oprd.models.loading import load_model

    if cfg.teacher.path is None:
        return None
    return load_model(TeacherConfig(path=cfg.teacher.path, dtype=cfg.dtype), device)
