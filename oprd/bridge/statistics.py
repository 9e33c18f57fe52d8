"""Streaming means and second moments of two models' hidden states, from which a bridge is fitted.

Second moments are centred and merged with the pairwise update of Chan et al., so that large means
do not cause cancellation. Memory depends only on the widths, not on the number of tokens.

Shapes: N rows given, M of them used; dS and dT widths of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oprd import distributed

CHUNK = 4096
"""The number of rows multiplied at once, which bounds the copies and float32's accumulation error.
"""


@dataclass
class PairStatistics:
    """The float64 statistics of one pair of layers.

    Attributes:
        count: number of rows seen.
        student_mean, teacher_mean: (dS,), (dT,).
        student_scatter: (dS, dS), sum of (h_S - mean)(h_S - mean)'.
        teacher_scatter: (dT, dT), sum of (h_T - mean)(h_T - mean)'.
        cross_scatter: (dS, dT), sum of (h_S - mean)(h_T - mean)'.
    """

    count: int
    student_mean: Tensor
    teacher_mean: Tensor
    student_scatter: Tensor
    teacher_scatter: Tensor
    cross_scatter: Tensor

    @classmethod
    def empty(
        cls, student_width: int, teacher_width: int, device: torch.device | str = "cpu"
    ) -> PairStatistics:
        """Return the statistics of no rows."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        s, t = student_width, teacher_width
        return cls(0, zeros(s), zeros(t), zeros(s, s), zeros(t, t), zeros(s, t))

    @property
    def student_gram(self) -> Tensor:
        """(dS, dS) H_S' H_S, not centred because the student's projector has no bias."""
        mean = self.student_mean
        return self.student_scatter + self.count * torch.outer(mean, mean)

    @property
    def cross(self) -> Tensor:
        """(dS, dT) H_S' (H_T - mean). It is the same whether H_S is centred or not."""
        return self.cross_scatter

    @torch.no_grad()
    def update(
        self,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor | None = None,
        products: torch.dtype = torch.float64,
    ) -> None:
        """Add rows.

        Args:
            student: (N, dS), any floating dtype.
            teacher: (M, dT), only the rows used.
            rows: (M,) int64, the rows of ``student`` used, in the order of ``teacher``. Other rows
                are never read. None: all rows.
            products: dtype of the matrix products. Sums over chunks are always float64. float32 is
                for GPUs that are slow in float64.

        Raises:
            ValueError: if the numbers of rows or the widths do not match.
        """
        m = student.shape[0] if rows is None else rows.numel()
        wanted = (m, self.teacher_mean.numel())
        if tuple(teacher.shape) != wanted or student.shape[-1] != self.student_mean.numel():
            raise ValueError(
                f"expected student rows {self.student_mean.numel()} wide and a teacher {wanted}, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        for start in range(0, m, CHUNK):
            part = slice(start, start + CHUNK)
            picked = student[part] if rows is None else student[rows[part]]
            self.merge(self._of_chunk(picked, teacher[part], products))

    def _of_chunk(self, student: Tensor, teacher: Tensor, products: torch.dtype) -> PairStatistics:
        device = self.student_mean.device
        s, t = (x.to(device).double() for x in (student, teacher))
        mean_s, mean_t = s.mean(0), t.mean(0)
        s, t = (s - mean_s).to(products), (t - mean_t).to(products)
        with torch.autocast(device.type, enabled=False):
            scatters = [a.T @ b for a, b in ((s, s), (t, t), (s, t))]
        return PairStatistics(s.shape[0], mean_s, mean_t, *(x.double() for x in scatters))

    def merge(self, other: PairStatistics) -> None:
        """Add the rows that ``other`` has seen."""
        total = self.count + other.count
        if other.count == 0:
            return
        delta_s = other.student_mean - self.student_mean
        delta_t = other.teacher_mean - self.teacher_mean
        weight = self.count * other.count / total
        self.student_scatter += other.student_scatter
        self.student_scatter.addr_(delta_s, delta_s, alpha=weight)
        self.teacher_scatter += other.teacher_scatter
        self.teacher_scatter.addr_(delta_t, delta_t, alpha=weight)
        self.cross_scatter += other.cross_scatter
        self.cross_scatter.addr_(delta_s, delta_t, alpha=weight)
        self.student_mean += delta_s * (other.count / total)
        self.teacher_mean += delta_t * (other.count / total)
        self.count = total

    def reduce_over_ranks(self) -> None:
        """Replace the statistics, on every rank, with those of all ranks' rows together."""
        device = self.student_mean.device
        count = round(distributed.sum_over_ranks([float(self.count)], device)[0])
        if count == 0:
            return
        means = [
            distributed.sum_tensor(mean * (self.count / count))
            for mean in (self.student_mean, self.teacher_mean)
        ]
        delta_s, delta_t = self.student_mean - means[0], self.teacher_mean - means[1]
        for scatter, a, b in (
            (self.student_scatter, delta_s, delta_s),
            (self.teacher_scatter, delta_t, delta_t),
            (self.cross_scatter, delta_s, delta_t),
        ):
            scatter.addr_(a, b, alpha=self.count)
            distributed.sum_tensor(scatter)
        self.student_mean, self.teacher_mean, self.count = means[0], means[1], count
