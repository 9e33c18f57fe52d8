"""Advice on how to make a run fit its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oprd.config import TrainConfig
from oprd.memory_plan.run import (
    ENGINE,
    EVALUATION,
    ROLLOUT,
    TrainingPlan,
    gib,
    make_training_plan,
    recomputed_blocks,
)
from oprd.memory_plan.shapes import Shape


def advice(
    cfg: TrainConfig,
    student: Shape,
    teachers: dict[str, Shape],
    gpus: int,
    memory: int,
    ranks: Mapping[str, int] | None = None,
) -> str:
    """Say in words what to change so that a run that does not fit its GPUs does."""

    def planned(changed: TrainConfig) -> TrainingPlan:
        return make_training_plan(changed, student, teachers, gpus, memory, ranks=ranks)

    def total(changed: TrainConfig) -> int:
        return planned(changed).total

    plan = planned(cfg)
    resident = sum(plan.resident.values())
    if resident > memory:
        tips = ["take more GPUs"]
        if cfg.student.lora.rank is None:
            tips.append("train an adapter (student.lora.rank)")
        if not cfg.fsdp.cpu_offload:
            tips.append("set fsdp.cpu_offload")
        return f"weights and optimizer alone take {gib(resident)} GiB: {' or '.join(tips)}"
    if plan.moments[plan.worst].name == ENGINE:
        share = int(100 * (memory - resident) / memory) / 100
        return f"lower rollout.vllm.gpu_memory_utilization to {share}"
    if plan.worst in plan.sequences:
        section = {ROLLOUT: "rollout", EVALUATION: "eval"}[plan.worst]
        size = plan.sequences[plan.worst] // 2
        while size >= 1:
            smaller: Any = replace(getattr(cfg, section), batch_size=size)
            changed = replace(cfg, **{section: smaller})
            moments = planned(changed).moments
            if resident + moments[plan.worst].total <= memory:
                return f"lower {section}.batch_size to {size}"
            size //= 2
        return f"a single sequence is too long: lower {section}.max_new_tokens"
    if recomputed_blocks(cfg.student.gradient_checkpointing) is not True:
        changed = replace(cfg, student=replace(cfg.student, gradient_checkpointing=True))
        if total(changed) <= memory:
            return "set student.gradient_checkpointing to true or auto"
        cfg = changed
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    for tokens in range(plan.tokens // 1024 * 1024, longest - 1, -1024):
        if total(replace(cfg, micro_batch_tokens=tokens)) <= memory:
            return f"lower micro_batch_tokens to {tokens}"
    return (
        f"a single response of {longest} tokens is too long at any micro_batch_tokens: lower "
        "rollout.max_new_tokens, take more GPUs, or train an adapter (student.lora.rank)"
    )
