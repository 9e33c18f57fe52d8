"""Launches the native CPU kernels on tensors that `oprd_kernels.validate` has accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels.backends import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
ROW_STATS = 3
BATCH_STATS = 5
SCALE = 4
"""Index in the batch statistics of the factor that the reduction puts on every row."""

_NO_ROWS = (0, 0, 1, 0, 0, 1)


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """A (N, d) or (B, T, d) tensor as the native code addresses it."""
    *outer, inner, last = x.stride()
    rows_inside = max(x.shape[-2], 1)
    return x.data_ptr(), DTYPE_CODES[x.dtype], rows_inside, outer[0] if outer else 0, inner, last


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _problem(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
):
    return native().Problem(
        _rows(student),
        _rows(teacher),
        num_rows(student, rows),
        student.shape[-1],
        teacher.shape[-1],
        0 if student_proj is None else student_proj.shape[0],
        _address(student_proj),
        _address(teacher_proj),
        _address(teacher_mean),
        _address(rows),
        _address(teacher_rows),
        _address(weights),
        KIND_CODES[kind],
        torch.get_num_threads(),
    )


def num_rows(student: Tensor, rows: Tensor | None) -> int:
    """M: how many rows of student are compared."""
    return rows.shape[0] if rows is not None else student.shape[:-1].numel()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row statistics (M, 3), dz (M, r) or empty, batch statistics (5,); all float32.

    ``grad``, if given, receives the gradient of the reduced loss with respect to ``student``;
    it may be ``teacher`` itself.
    """
    m = num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    row_loss = student.new_empty((m,), dtype=torch.float32)
    row_stats = student.new_empty((m, ROW_STATS), dtype=torch.float32)
    dz = student.new_empty((m, rank) if rank else (0,), dtype=torch.float32)
    stats = student.new_empty((BATCH_STATS,), dtype=torch.float32)
    loss = None if reduction == "none" else student.new_empty((), dtype=torch.float32)
    native().forward(
        _problem(
            student,
            teacher,
            student_proj,
            teacher_proj,
            teacher_mean,
            rows,
            teacher_rows,
            weights,
            kind,
        ),
        row_loss.data_ptr(),
        row_stats.data_ptr(),
        dz.data_ptr(),
        _NO_ROWS if grad is None else _rows(grad),
        _address(denominator),
        reduction == "mean",
        _address(loss),
        stats.data_ptr(),
    )
    return row_loss if loss is None else loss, row_stats, dz, stats


def backward_(
    grad: Tensor,
    accumulate: bool,
    grad_loss: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    student_proj: Tensor | None,
    row_stats: Tensor,
    dz: Tensor,
    stats: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
) -> None:
    """Writes (or adds) the gradient of the loss into the supervised rows of ``grad``.

    ``grad`` has the student's shape and any of the supported dtypes; other rows are not touched.
    ``grad_loss`` is a scalar, or (M,) for reduction "none". After a projection the gradient
    follows from dz alone: student and teacher may be None.
    """
    grad_loss = grad_loss.float()
    student = grad if student is None else student
    teacher = student if teacher is None else teacher
    native().backward(
        _problem(student, teacher, student_proj, None, None, rows, teacher_rows, weights, kind),
        row_stats.data_ptr(),
        dz.data_ptr(),
        grad_loss.data_ptr(),
        grad_loss.stride(0) if grad_loss.dim() else 0,
        stats[SCALE].data_ptr(),
        _rows(grad),
        accumulate,
    )
