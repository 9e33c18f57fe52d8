"""Options for the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oprd.errors import Problems

UPDATED_AT_ONCE = 1 << 26
"""Weights that stochastic rounding updates at once, in float32."""


@dataclass
class OptimConfig:
    """AdamW with linear warm-up.

    Attributes:
        lr: peak learning rate.
        betas: AdamW's decay rates of the moment estimates.
        weight_decay: AdamW's weight decay, of all trained weights, norms and biases included.
        warmup_ratio: fraction of the steps in which the learning rate rises; of n such steps the
            first has 1 / n of it.
        schedule: learning rate after the warm-up: ``cosine`` (decays to 0) or ``constant``.
        rounding: how a bfloat16 student's new weights are rounded. ``nearest``: an update of less
            than 1/512 of a weight may be lost. ``stochastic``: up or down at random, so that
            updates of any size count on average; AdamW's moments are then float32.
        fused: update the weights by PyTorch's fused kernels, which make no temporaries. This
            equals the unfused update up to rounding, and reads its checkpoints. Not used with
            ``rounding: stochastic``.
        max_grad_norm: clip gradients to this global norm; null: do not clip.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    fused: bool = True
    max_grad_norm: float | None = 1.0

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
        need = problems.need
        need(self.lr > 0, f"optim.lr must be above 0, got {self.lr}")
        need(
            all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}"
        )
        need(
            self.weight_decay >= 0,
            f"optim.weight_decay must not be negative, got {self.weight_decay}",
        )
        need(
            0 <= self.warmup_ratio <= 1,
            f"optim.warmup_ratio must lie in [0, 1], got {self.warmup_ratio}",
        )
        need(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"optim.max_grad_norm must be above 0 or null, got {self.max_grad_norm}",
        )
