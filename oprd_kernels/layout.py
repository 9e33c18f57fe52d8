"""The one float32 buffer, ``saved``, that carries everything from forward to backward, alike for
all backends:

batch statistics (STATS) | row statistics (3, M) | row losses (M), unless they are the result
themselves | dz (M, r), if there is a projection.

Row statistics: 1 / |s| (0 for a row that gets no gradient), 1 / |t|, 1 - cos.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATS = 5
"""Floats at the start of ``saved``: mean cosine, mean student norm, mean teacher norm, number of
rows whose weight is not 0, the factor the reduction puts on every row."""
SCALE = 4
ROW_STATS = 3


def num_rows(student: Tensor, rows: Tensor | None) -> int:
    """M: how many rows of student are compared."""
    return student.shape[:-1].numel() if rows is None else rows.shape[0]


def saved_size(m: int, rank: int, reduction: str) -> int:
    """Floats in ``saved`` for one layer."""
    return STATS + (rank + (ROW_STATS if reduction == "none" else ROW_STATS + 1)) * m


def dz_of(saved: Tensor, m: int, rank: int) -> Tensor:
    """The (M, r) part of one layer's ``saved``."""
    return saved[saved.shape[0] - m * rank :].view(m, rank)


def new_outputs(student: Tensor, m: int, rank: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and ``saved`` of one layer, not yet written."""
    options: dict[str, Any] = {} if student.dtype is torch.float32 else {"dtype": torch.float32}
    loss = student.new_empty((m,) if reduction == "none" else (), **options)
    return loss, student.new_empty(saved_size(m, rank, reduction), **options)


def coefficients(
    grad_loss: Tensor, saved: Tensor, weights: Tensor | None, at: slice = slice(None)
) -> Tensor:
    """(M,) or (): what the chain rule multiplies each row's dz by."""
    value = grad_loss[at] if grad_loss.dim() else grad_loss
    value = value * saved[SCALE]
    return value if weights is None else value * weights[at]
