"""How many blocks must recompute their activations so that a run fits its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from oprd.config import TrainConfig
from oprd.memory_plan.run import TrainingPlan, make_training_plan
from oprd.memory_plan.shapes import Shape

MARGIN = 0.05
"""Share of the memory that is left free: the plan is within 2 % of the allocator, which fragments,
and libraries allocate workspaces."""


def fewest_blocks(
    cfg: TrainConfig,
    student: Shape,
    teachers: dict[str, Shape],
    gpus: int,
    memory: int,
    on_gpu: bool,
    ranks: Mapping[str, int] | None = None,
) -> tuple[int, TrainingPlan]:
    """Return the smallest number of recomputed blocks with which a run fits, and its plan.

    If none does, all blocks are recomputed.

    Args:
        memory: bytes that the run may use on each of ``gpus``.
        on_gpu, ranks: as in `make_training_plan`.
    """

    def planned(blocks: int) -> TrainingPlan:
        changed = replace(cfg, student=replace(cfg.student, gradient_checkpointing=blocks))
        return make_training_plan(changed, student, teachers, gpus, memory, on_gpu, ranks)

    low, high = 0, student.layers
    while low < high:  # more blocks never need more memory
        middle = (low + high) // 2
        if planned(middle).total <= memory * (1 - MARGIN):
            high = middle
        else:
            low = middle + 1
    return high, planned(high)
