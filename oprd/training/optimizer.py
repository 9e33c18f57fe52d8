"""The AdamW optimizer and its learning rate schedule."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from oprd.config import OptimConfig

SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}


def make_optimizer(
    student: nn.Module, cfg: OptimConfig, steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return optimizer and scheduler for a run of ``steps`` steps.

    FSDP2 replaces parameters, so the student must be sharded before.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay
    )
    warmup = math.ceil(cfg.warmup_ratio * steps)
    return optimizer, get_scheduler(SCHEDULES[cfg.schedule], optimizer, warmup, steps)


def fast_forward(scheduler: LRScheduler, steps: int) -> None:
    """Advance a new scheduler by ``steps`` steps.

    The learning rate depends only on the number of steps.
    """
    with warnings.catch_warnings(action="ignore"):  # "optimizer.step() not called"
        for _ in range(steps):
            scheduler.step()
