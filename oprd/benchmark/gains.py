"""``oprd-gains``: time and memory of the actor update by objective, measured and predicted."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains_plan import check, check_memory, make_plan, model_config, shape_of
from oprd.errors import ConfigError
from oprd.memory_plan.objectives import OBJECTIVES


def build_student(cfg: GainsConfig, config: Any, device: torch.device) -> Any:
    """Make the student, with random weights unless ``student.path`` is set."""
    from transformers import AutoModelForCausalLM

    from oprd.config import StudentConfig
    from oprd.models.loading import load_model

    if cfg.student.path is not None:
        return load_model(StudentConfig(path=cfg.student.path, dtype=cfg.dtype), device)
    torch.manual_seed(cfg.seed)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype)).to(device)


def measure(cfg: GainsConfig, student: Any, teacher: Any, console: Any) -> dict:
    """Measure every objective in rounds: the first for memory and warm-up, the others for time.

    Returns:
        For each mode (``on``, ``off``) the `Measured` of every objective. Under ``teacher``, the
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
        with_logits=any(OBJECTIVES[name].is_materialised for name in chosen),
        with_bridge="bridge" in chosen,
        seed=cfg.seed,
    )
    wanted = sorted({kind for name in chosen if (kind := OBJECTIVES[name].teacher_outputs)})
    measured: dict[str, Any] = {"teacher": {kind: [] for kind in wanted}}
    for mode in cfg.modes:
        if mode:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            student.gradient_checkpointing_disable()
        results = {o: Measured() for o in chosen}
        measured["on" if mode else "off"] = results
        for round_ in range(cfg.rounds + 1):
            named = f"checkpointing {'on' if mode else 'off'}, round {round_} of {cfg.rounds}"
            for objective in chosen:
                console.print(f"{named}: {OBJECTIVES[objective].title}")
                if round_ == 0:
                    with freed_at_once():
                        results[objective].delta_peaks.append(actor.measure(objective).delta_peak)
                else:
                    results[objective].add(actor.measure(objective))
            if round_ > 0:
                for kind in wanted:
                    measured["teacher"][kind].append(actor.teacher_seconds(kind))
    return measured


def run(cfg: GainsConfig, command: str, dry_run: bool) -> None:
    """Predict, and unless ``dry_run`` also measure; print the results and write the report.

    Raises:
        ConfigError: if a setting is wrong, the models don't fit together or memory is too small.
    """
    from rich.console import Console

    from oprd.benchmark import report as gains_report
    from oprd.config import TeacherConfig
    from oprd.models.compatibility import check_pair
    from oprd.models.loading import load_config, load_model
    from oprd.observability.memory import available_bytes

    check(cfg, dry_run)
    console = Console(highlight=False)
    config = model_config(cfg)
    shape = shape_of(config, "student")
    teacher_shape = None
    if cfg.teacher.path is not None:
        teacher_config = load_config(cfg.teacher.path)
        check_pair(config, teacher_config, "all")
        teacher_shape = shape_of(teacher_config, "teacher")
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    plan = make_plan(cfg, shape, teacher_shape, device.type == "cuda")
    if dry_run:
        for table in gains_report.prediction_tables(cfg, shape, plan):
            console.print(table)
        console.print(gains_report.paper_table())
        for line in gains_report.PAPER_DIFFERENCES:
            console.print(f"- {line}", soft_wrap=True)
        return
    if cfg.output_dir is not None and Path(cfg.output_dir, "gains.json").exists():
        raise ConfigError(
            f"{cfg.output_dir} holds the gains.json of another run: choose another --output_dir"
        )
    check_memory(plan, available_bytes(device))
    student = build_student(cfg, config, device)
    teacher = None
    if cfg.teacher.path is not None:
        teacher = load_model(TeacherConfig(path=cfg.teacher.path, dtype=cfg.dtype), device)
    measured = measure(cfg, student, teacher, Console(stderr=True, highlight=False))
    report: dict[str, Any] = {
        "command": command,
        "machine": gains_report.machine(device),
        "config": asdict(cfg),
        "shape": {f.name: getattr(shape, f.name) for f in fields(shape)},
        "parameters": shape.parameters,
        "rows": cfg.batch * (cfg.tokens - cfg.prompt),
        "resident_bytes": plan.resident,
        "modes": {
            mode: gains_report.summary(
                measured[mode], measured["teacher"], plan.peaks[mode == "on"]
            )
            for mode in ("on", "off")
            if mode in measured
        },
    }
    for mode, rows in report["modes"].items():
        for table in gains_report.tables(report, mode, rows):
            console.print(table)
    if cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "gains.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (directory / "gains.md").write_text(gains_report.markdown(report), "utf-8")
