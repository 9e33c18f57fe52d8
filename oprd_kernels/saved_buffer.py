"""The float32 buffer ``saved`` that carries everything from forward to backward.

It begins with the batch statistics (STATS). The rest is its backend's own; the native backends have

row statistics (3, M) | row losses (M), unless they are the result themselves | dz (M, r), if there
is a projection.

Row statistics: 1 / |s| (0 for a row that gets no gradient), 1 / |t|, 1 - cos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall, num_rows

STATS = 5
"""Floats at the start of ``saved``: mean cosine, mean student norm, mean teacher norm, number of
rows whose weight is not 0, the factor the reduction puts on every row."""
SCALE = 4
ROW_STATS = 3

_PROJ_CHUNK = 1024
"""Rows of student upcast to float32 at a time."""


def new_outputs(call: LossCall, size: int) -> tuple[Tensor, Tensor]:
    """Loss and ``saved``, not yet written. Of the ways to say it the quickest: allocations are most
    of what a call costs."""
    student = call.student
    if student.dtype is torch.float32:
        saved = student.new_empty(size)
    else:
        saved = student.new_empty(size, dtype=torch.float32)
    if call.reduction == "none":
        return saved.new_empty(call.num_rows), saved
    return saved.new_empty_strided((), ()), saved


def new_layers(call: LossCall, layers: int, size: int) -> tuple[Tensor, Tensor]:
    """The losses of so many layers like ``call``, and their ``saved``, one a row."""
    saved = call.student.new_empty((layers, size), dtype=torch.float32)
    return saved.new_empty(layers), saved


def dz_of(saved: Tensor, m: int, rank: int) -> Tensor:
    """The (M, r) part of one layer's ``saved``."""
    return saved[saved.shape[0] - m * rank :].view(m, rank)


def coefficients(
    grad_loss: Tensor, saved: Tensor, weights: Tensor | None, at: slice = slice(None)
) -> Tensor:
    """(M,) or (): what the chain rule multiplies each row's dz by."""
    value = grad_loss[at] if grad_loss.dim() else grad_loss
    value = value * saved[SCALE]
    return value if weights is None else value * weights[at]


class RowsLayout:
    """The native backends' layout, and what of a backend (`backends.protocol`) follows from it
    alone."""

    def saved_size(self, call: LossCall) -> int:
        """Floats in ``saved``."""
        row = ROW_STATS if call.reduction == "none" else ROW_STATS + 1
        return STATS + (row + call.rank) * call.num_rows

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """The gradient with respect to student_proj, summed over rows in chunks by BLAS."""
        student, proj, rows, weights = call.student, call.student_proj, call.rows, call.weights
        assert student is not None
        assert proj is not None
        m = num_rows(student, rows)
        coefficient = coefficients(grad_loss, call.saved, weights)
        scaled = dz_of(call.saved, m, proj.shape[0]) * coefficient.reshape(-1, 1)
        learns = call.saved[SCALE] != 0
        scaled = torch.where(learns, scaled, 0.0)
        flat = student.flatten(0, -2)
        grad = torch.zeros_like(proj)
        for start in range(0, m, _PROJ_CHUNK):
            chunk = slice(start, start + _PROJ_CHUNK)
            h = flat[chunk] if rows is None else flat[rows[chunk]]
            h = h.float()
            # 0 * NaN, of a masked row or where there is nothing to learn from, would be NaN.
            live = learns if weights is None else (weights[chunk] != 0)[:, None] & learns
            h = torch.where(live, h, 0.0)
            grad.addmm_(scaled[chunk].T, h)
        return grad
