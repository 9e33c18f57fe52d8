"""Launches the native CPU kernels on tensors that `oprd_kernels.validate` has accepted.

One float32 buffer, ``saved``, carries everything from forward to backward:
batch statistics (STATS) | row statistics (M, 3) | row losses (M), unless they are the result
themselves | dz (M, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oprd_kernels.backends import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
STATS = 5
"""Floats at the start of ``saved``: mean cosine, mean student norm, mean teacher norm, number of
rows whose weight is not 0, the factor the reduction puts on every row."""
SCALE = 4

_NO_ROWS = (0, 0, 1, 0, 0, 1)


def num_rows(student: Tensor, rows: Tensor | None) -> int:
    """M: how many rows of student are compared."""
    return student.shape[:-1].numel() if rows is None else rows.shape[0]


def saved_size(m: int, rank: int, reduction: str) -> int:
    """Floats in ``saved``."""
    return STATS + (rank + (3 if reduction == "none" else 4)) * m


def dz_of(saved: Tensor, m: int, rank: int) -> Tensor:
    """The (M, r) part of ``saved``."""
    return saved[saved.shape[0] - m * rank :].view(m, rank)


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """A (N, d) or (B, T, d) tensor as the native code addresses it."""
    strides, inner = x.stride(), max(x.shape[-2], 1)
    if len(strides) == 2:
        return x.data_ptr(), DTYPE_CODES[x.dtype], inner, 0, strides[0], strides[1]
    return x.data_ptr(), DTYPE_CODES[x.dtype], inner, strides[0], strides[1], strides[2]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def forward(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    kind: str,
    reduction: str,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and ``saved``.

    ``grad``, if given, receives the gradient of the reduced loss with respect to ``student``;
    it may be ``teacher`` itself.
    """
    m = num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    per_row = reduction == "none"
    options: dict[str, Any] = {} if student.dtype is torch.float32 else {"dtype": torch.float32}
    loss = student.new_empty((m,) if per_row else (), **options)
    saved = student.new_empty(saved_size(m, rank, reduction), **options)
    base = saved.data_ptr()
    row_stats = base + 4 * STATS
    row_loss = row_stats + 12 * m
    native().forward(
        _rows(student),
        _rows(teacher),
        m,
        student.shape[-1],
        teacher.shape[-1],
        rank,
        _address(student_proj),
        _address(teacher_proj),
        _address(teacher_mean),
        _address(rows),
        _address(teacher_rows),
        _address(weights),
        KIND_CODES[kind],
        torch.get_num_threads(),
        loss.data_ptr() if per_row else row_loss,
        row_stats,
        base + 4 * (saved.shape[0] - m * rank),
        _NO_ROWS if grad is None else _rows(grad),
        _address(denominator),
        reduction == "mean",
        0 if per_row else loss.data_ptr(),
        base,
    )
    return loss, saved


def backward_(
    grad: Tensor,
    accumulate: bool,
    grad_loss: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    student_proj: Tensor | None,
    saved: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
) -> None:
    """Writes (or adds) the gradient of the loss into the supervised rows of ``grad``.

    ``grad`` has the student's shape and any of the supported dtypes; other rows are not touched.
    ``grad_loss`` is a float32 scalar, or (M,) for reduction "none". After a projection the
    gradient follows from dz alone: student and teacher may be None.
    """
    student = grad if student is None else student
    teacher = student if teacher is None else teacher
    m = num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    base = saved.data_ptr()
    native().backward(
        _rows(student),
        _rows(teacher),
        m,
        student.shape[-1],
        teacher.shape[-1],
        rank,
        _address(student_proj),
        _address(rows),
        _address(teacher_rows),
        _address(weights),
        KIND_CODES[kind],
        torch.get_num_threads(),
        base + 4 * STATS,
        base + 4 * (saved.shape[0] - m * rank),
        grad_loss.data_ptr(),
        grad_loss.stride(0) if grad_loss.dim() else 0,
        base + 4 * SCALE,
        _rows(grad),
        accumulate,
    )
