"""The optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oprd.errors import Problems


@dataclass
class OptimConfig:
    """AdamW with linear warm-up.

    Attributes:
        lr: peak learning rate.
        betas, weight_decay: AdamW's.
        warmup_ratio: share of the steps that the learning rate rises over.
        schedule: ``cosine`` (to 0) or ``constant`` after the warm-up.
        max_grad_norm: gradients are clipped to this global norm; null: they are not.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float | None = 1.0


def check_optim(problems: Problems, o: OptimConfig) -> None:
    """What is wrong with its numbers."""
    need = problems.need
    need(o.lr > 0, f"optim.lr must be above 0, got {o.lr}")
    need(all(0 <= b < 1 for b in o.betas), f"optim.betas must lie in [0, 1), got {o.betas}")
    need(o.weight_decay >= 0, f"optim.weight_decay must not be negative, got {o.weight_decay}")
    need(0 <= o.warmup_ratio <= 1, f"optim.warmup_ratio must lie in [0, 1], got {o.warmup_ratio}")
    need(
        o.max_grad_norm is None or o.max_grad_norm > 0,
        f"optim.max_grad_norm must be above 0 or null, got {o.max_grad_norm}",
    )
