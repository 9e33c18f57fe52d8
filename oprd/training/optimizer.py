"""AdamW over what is trained, and its learning rate."""

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
    """For a run of ``steps`` steps; after the student is sharded."""
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay
    )
    warmup = math.ceil(cfg.warmup_ratio * steps)
    return optimizer, get_scheduler(SCHEDULES[cfg.schedule], optimizer, warmup, steps)


def fast_forward(scheduler: LRScheduler, steps: int) -> None:
    """To the learning rate after so many steps, which is a function of their number alone."""
    with warnings.catch_warnings(action="ignore"):  # that the optimizer has made no step
        for _ in range(steps):
            scheduler.step()
