"""The arguments that the public functions pass to the kernels: `LossCall` for the forward pass and
`GradCall` for the backward pass.

`torch.library` needs flat lists of arguments in the ops' schemas. Their order is the order of the
fields here. The native code reads these tuples directly (csrc/arguments.h).

Both are NamedTuples because a frozen dataclass takes ten times as long to make.

Shapes: M supervised rows; dS and dT: widths of student and teacher; r: projector rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def num_rows(x: Tensor, rows: Tensor | None) -> int:
    """Return M, the number of compared rows of a (N, d) or (B, T, d) tensor."""
    if rows is not None:
        return rows.shape[0]
    shape = x.shape
    return shape[0] if len(shape) == 2 else shape[0] * shape[1]


class LossCall(NamedTuple):
    """The validated tensors and options of one forward call."""

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
        """The number of compared rows M."""
        return num_rows(self.student, self.rows)

    @property
    def rank(self) -> int:
        """The projector rank r, or 0 if the rows are compared without a projection."""
        return 0 if self.student_proj is None else self.student_proj.shape[0]

    @property
    def is_double(self) -> bool:
        """Whether student, teacher or projectors are float64, as in gradcheck and test oracles.

        The projectors are either all float64 or all float32, so one of them decides.
        """
        proj = self.student_proj
        return (
            self.student.dtype is torch.float64
            or self.teacher.dtype is torch.float64
            or (proj is not None and proj.dtype is torch.float64)
        )


class GradCall(NamedTuple):
    """The arguments for the gradient of a `LossCall`, with the same field names.

    After a projection the gradient follows from ``saved``. The teacher is then None, and so is the
    student unless student_proj is trained.
    """

    saved: Tensor
    student: Tensor | None = None
    teacher: Tensor | None = None
    student_proj: Tensor | None = None
    rows: Tensor | None = None
    teacher_rows: Tensor | None = None
    weights: Tensor | None = None
    kind: str = "nmse"
    reduction: str = "mean"
