"""Which blocks of the student recompute their activations, so that a run fits its device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from oprd import distributed
from oprd.config import TrainConfig
from oprd.errors import ConfigError
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.recompute import fewest_blocks
from oprd.memory_plan.report import shapes
from oprd.memory_plan.run import gib
from oprd.observability.memory import available_bytes


def choose_blocks(
    cfg: TrainConfig, device: torch.device, bridge_ranks: Mapping[str, int]
) -> tuple[bool | int, list[str]]:
    """Return what ``student.gradient_checkpointing`` asks for, and notes. Collective.

    Call this before the models are loaded: ``auto`` shares out the memory that is free.

    Args:
        bridge_ranks: ranks of the bridges, by teacher.

    Returns:
        True (all blocks), False (none), or the number of blocks to recompute, from the first.
    """
    option = cfg.student.gradient_checkpointing
    if option != "auto":
        return option, []
    named = "student.gradient_checkpointing=auto"
    free = available_bytes(device)
    ranks = distributed.world_size()
    memory = -distributed.max_over_ranks(-float(free or 0), device)
    if device.type == "cpu":  # which the ranks share
        memory /= ranks
    if not memory:
        return True, [f"{named}: the free memory is not known, so all blocks are recomputed"]
    try:
        student, teachers = shapes(cfg, PlanConfig())
    except ConfigError as error:
        return True, [f"{named}: all blocks are recomputed, without a plan: {error}"]
    on_gpu = device.type == "cuda"
    blocks, plan = fewest_blocks(cfg, student, teachers, ranks, int(memory), on_gpu, bridge_ranks)
    note = (
        f"{named}: {blocks} of {student.layers} blocks are recomputed; the plan is "
        f"{gib(plan.total)} GiB of {gib(memory)} GiB"
    )
    return blocks, [note]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocation has failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
