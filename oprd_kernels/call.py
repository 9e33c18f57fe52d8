"""A call as it travels from the public functions to the kernels: `LossCall`, and `GradCall` for the
way back. Flat lists of arguments exist only where `torch.library` wants them, in the ops' schemas;
their order is that of the fields here. The native code reads these tuples as they are
(csrc/arguments.h).

NamedTuples: a frozen dataclass takes ten times as long to make.

Shapes: M supervised rows; student dS wide, teacher dT; r: projector rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def num_rows(x: Tensor, rows: Tensor | None) -> int:
    """M: how many rows of a (N, d) or (B, T, d) tensor are compared."""
    if rows is not None:
        return rows.shape[0]
    shape = x.shape
    return shape[0] if len(shape) == 2 else shape[0] * shape[1]


class LossCall(NamedTuple):
    """A call's tensors as the kernels take them, and its options."""

    student: Tensor  # (N, dS) or (B, T, dS)
    teacher: Tensor  # (N', dT) or (B, T, dT)
    student_proj: Tensor | None = None  # (r, dS) float32, contiguous
    teacher_proj: Tensor | None = None  # (r, dT) float32, contiguous
    teacher_mean: Tensor | None = None  # (dT,) float32, contiguous
    rows: Tensor | None = None  # (M,) int64
    teacher_rows: Tensor | None = None  # (M,) int64
    weights: Tensor | None = None  # (M,) float32
    denominator: Tensor | None = None  # () float32
    kind: str = "nmse"
    reduction: str = "mean"

    @property
    def num_rows(self) -> int:
        """M."""
        return num_rows(self.student, self.rows)

    @property
    def rank(self) -> int:
        """r; 0: the rows are compared as they are."""
        return 0 if self.student_proj is None else self.student_proj.shape[0]

    @property
    def is_double(self) -> bool:
        """Whether any tensor is float64 (gradcheck, oracles): the projectors then all are."""
        proj = self.student_proj
        return (
            self.student.dtype is torch.float64
            or self.teacher.dtype is torch.float64
            or (proj is not None and proj.dtype is torch.float64)
        )


class GradCall(NamedTuple):
    """What the gradient of a `LossCall` needs, with fields of the same names. After a projection it
    follows from ``saved``: the teacher is None, and so is the student unless student_proj is
    trained."""

    saved: Tensor
    student: Tensor | None = None
    teacher: Tensor | None = None
    student_proj: Tensor | None = None
    rows: Tensor | None = None
    teacher_rows: Tensor | None = None
    weights: Tensor | None = None
    kind: str = "nmse"
    reduction: str = "mean"
