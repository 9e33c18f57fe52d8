"""The float32 buffer ``saved`` that carries intermediate results from forward to backward.

It begins with the batch statistics (STATS floats). Each backend defines the rest. The native
backends store:

- row statistics (3, M): 1 / |s| (0 for a row that gets no gradient), 1 / |t|, 1 - cos;
- row losses (M), unless the reduction is "none", where they are the result;
- dz (M, r), if there is a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall, num_rows

STATS = 5
"""Number of floats at the start of ``saved``: mean cosine, mean student norm, mean teacher norm,
number of rows whose weight is not 0, and the factor by which the reduction multiplies each row."""
SCALE = 4
ROW_STATS = 3

_PROJ_CHUNK = 1024
"""Number of student rows that `RowsLayout.grad_proj` converts to float32 at a time."""


def new_outputs(call: LossCall, size: int) -> tuple[Tensor, Tensor]:
    """Allocate the loss and ``saved``.

    Allocations are most of the cost of a call, so this uses the fastest forms of ``new_empty``.
    """
    student = call.student
    if student.dtype is torch.float32:
        saved = student.new_empty(size)
    else:
        saved = student.new_empty(size, dtype=torch.float32)
    if call.reduction == "none":
        return saved.new_empty(call.num_rows), saved
    return saved.new_empty_strided((), ()), saved


def new_layers(call: LossCall, layers: int, size: int) -> tuple[Tensor, Tensor]:
    """Allocate the losses of ``layers`` layers like ``call``, and a ``saved`` row for each."""
    saved = call.student.new_empty((layers, size), dtype=torch.float32)
    return saved.new_empty(layers), saved


def dz_of(saved: Tensor, m: int, rank: int) -> Tensor:
    """Return dz (M, r), which is the last part of one layer's ``saved``."""
    return saved[saved.shape[0] - m * rank :].view(m, rank)


def coefficients(
    grad_loss: Tensor, saved: Tensor, weights: Tensor | None, at: slice = slice(None)
) -> Tensor:
    """Return the factor (M,) or () by which the chain rule multiplies each row of dz."""
    value = grad_loss[at] if grad_loss.dim() else grad_loss
    value = value * saved[SCALE]
    return value if weights is None else value * weights[at]


class RowsLayout:
    """The layout of ``saved`` in the native backends, and the methods that depend on it alone."""

    def saved_size(self, call: LossCall) -> int:
        """Return the number of floats in ``saved``."""
        row = ROW_STATS if call.reduction == "none" else ROW_STATS + 1
        return STATS + (row + call.rank) * call.num_rows

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """Return the gradient of student_proj, summed by BLAS over chunks of rows."""
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
            # Zero masked rows, and all rows if the scale is 0: there, 0 * NaN would be NaN.
            live = learns if weights is None else (weights[chunk] != 0)[:, None] & learns
            h = torch.where(live, h, 0.0)
            grad.addmm_(scaled[chunk].T, h)
        return grad
