"""What a run is going to do, in a few lines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from oprd.config import StudentConfig, TeacherConfig, TrainConfig
from oprd.distill.objectives import REP
from oprd.engines.factory import kind_on
from oprd.errors import ConfigError
from oprd.models.info import model_info
from oprd.models.loading import load_config, teacher_path
from oprd.models.self_check import without_weights
from oprd.training.inputs import RunInputs
from oprd_kernels.backends import registry


def _engine(name: str, device: torch.device) -> str:
    """Name the engine; where the model's cache does not allow it, a note says so."""
    return f"{kind_on(name, device)} (auto)" if name == "auto" else name


def overview(
    cfg: TrainConfig, inputs: RunInputs, device: torch.device, ranks: int, directory: Path
) -> list[str]:
    """Return the lines that describe a run after its checks.

    Args:
        directory: the run's output directory.
    """
    r, o, d = cfg.rollout, cfg.optim, cfg.distill
    responses = r.prompts_per_step * r.responses_per_prompt
    most = responses * (cfg.data.max_prompt_tokens + r.max_new_tokens)
    lines = [
        f"run {cfg.name!r}: {cfg.steps} steps of {r.prompts_per_step} prompts x "
        f"{r.responses_per_prompt} responses, at most {r.max_new_tokens} new tokens",
        f"sampling: {_engine(r.engine, device)}, temperature {r.temperature:g}, top_p {r.top_p:g}; "
        f"at most {most:,} tokens a step"
        + ("; each step's responses during the step before" if r.staleness else ""),
    ]
    for name, teacher in cfg.all_teachers.items():
        where = f" for the prompts of {name}" if name else ""
        lines.append(f"student {cfg.student.path} <- teacher {teacher.path}{where}")
    lines.append(f"student: {_model(cfg.student, cfg.student.path)}")
    for name, teacher in cfg.all_teachers.items():
        path = teacher_path(teacher, cfg.student)
        lines.append(f"teacher{f' {name}' if name else ''}: {_model(teacher, path)}")
    lines.append("objective: " + " + ".join(map(partial(_objective, cfg), cfg.objectives)))
    for pairs in inputs.layer_pairs.values() if REP in cfg.objectives else ():
        shown = [f"{s}<-{t}" for s, t in pairs]
        if len(shown) > 12:
            shown[4:-2] = [".."]
        lines.append(f"layers (student<-teacher): {', '.join(shown)} ({len(pairs)})")
    if REP in cfg.objectives:
        k = f", k {d.k}" if d.positions.endswith("_k") else ""
        lines.append(f"positions: {d.positions}{k}, shift {d.shift}, {d.reduction}")
    for name, prompts in {"train": inputs.train, **inputs.eval_sets}.items():
        if prompts:
            longest = max(len(p.token_ids) for p in prompts.prompts)
            lines.append(f"prompts {name}: {len(prompts)}, the longest {longest} tokens")
    lines.append(
        f"optimizer: AdamW, lr {o.lr:g}, warm-up {o.warmup_ratio:.0%}, {o.schedule}"
        + (", stochastic rounding" if o.rounding == "stochastic" else "")
    )
    precision = cfg.autocast or cfg.fsdp.param_dtype or cfg.student.dtype
    kernels = ", ".join(n for n in _BACKENDS if registry.unavailable(n, device) is None)
    chosen = (kernels or "reference") if d.backend == "auto" else d.backend
    lines.append(
        f"device: {device}, {ranks} rank{'s' if ranks > 1 else ''}, products in {precision}"
        + (f", kernels: {chosen}" if REP in cfg.objectives else "")
    )
    lines.append(f"output: {directory}")
    return lines


_BACKENDS = ("cuda", "triton", "cpu")


def _objective(cfg: TrainConfig, name: str) -> str:
    weight = cfg.objectives[name]
    scaled = name if weight == 1 else f"{weight:g} {name}"
    if name != REP:
        return scaled
    bridge = any(b.path is not None for b in cfg.all_bridges.values())
    return f"{scaled} ({cfg.distill.kind}{', through a bridge' if bridge else ''})"


def _model(cfg: StudentConfig | TeacherConfig, path: str) -> str:
    try:
        config = load_config(path)
    except ConfigError:  # the hub can't be reached
        return f"unknown, {cfg.dtype}"
    info = model_info(config)
    shape = f"{info.layers} layers, {info.width} wide, {cfg.dtype}"
    number = _parameters(config)
    adapter = cfg.lora.rank if isinstance(cfg, StudentConfig) else None
    suffix = "" if adapter is None else f", trained through an adapter of rank {adapter}"
    return f"{shape}{suffix}" if number is None else f"{_scaled(number)}, {shape}{suffix}"


def _parameters(config: PretrainedConfig) -> int | None:
    try:
        return sum(p.numel() for p in without_weights(config).root.parameters())
    except Exception:  # the model's own, which loading its weights will tell
        return None


def _scaled(number: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name} parameters"
    return f"{number} parameters"
