"""The AdamW optimizer and its learning rate schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from oprd.config import OptimConfig
from oprd.training.rounding import StochasticAdamW


def make_optimizer(
    student: nn.Module, cfg: OptimConfig, steps: int, seed: int = 0
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return optimizer and scheduler for a run of ``steps`` steps.

    FSDP2 replaces parameters, so the student must be sharded before.

    Args:
        seed: seed of stochastic rounding.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    options = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    optimizer: torch.optim.Optimizer
    if cfg.rounding == "stochastic":
        optimizer = StochasticAdamW(trained, **options, seed=seed)  # type: ignore[arg-type]
    else:
        fused = cfg.fused and can_fuse(trained)
        optimizer = torch.optim.AdamW(trained, **options, fused=fused)  # type: ignore[arg-type]
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(cfg, step, steps))


FUSED_DEVICES = ("cuda", "cpu")


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether PyTorch's fused AdamW can update these parameters, sharded or not."""
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def lr_factor(cfg: OptimConfig, step: int, steps: int) -> float:
    """Return the share of ``optim.lr`` in step ``step``, counted from 0, of ``steps`` steps.

    In n steps of warm-up it rises from 1 / n to 1. A cosine then falls from 1 and would be 0 in the
    step after the last.
    """
    warmup = math.ceil(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if cfg.schedule == "constant" or step >= steps:
        return 1.0 if cfg.schedule == "constant" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether this rank's part of the trained weights is finite."""
    trained = [p.detach() for p in parameters if p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    norms = torch._foreach_norm([p for p in local if p.numel()])
    return bool(torch.stack([n.float() for n in norms]).isfinite().all()) if norms else True


def fast_forward(scheduler: LRScheduler, steps: int) -> None:
    """Advance a new scheduler by ``steps`` steps.

    The learning rate depends only on the number of steps.
    """
    with warnings.catch_warnings(action="ignore"):  # "optimizer.step() not called"
        for _ in range(steps):
            scheduler.step()
