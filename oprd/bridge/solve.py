"""Projectors from statistics: the teacher's principal directions, and the student's map to them.

Shapes: dS and dT widths of student and teacher, r rank, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oprd.bridge.statistics import PairStatistics
from oprd.errors import ConfigError


@dataclass(frozen=True)
class TeacherBasis:
    """The teacher's principal directions.

    Attributes:
        directions: (r, dT) float64, orthonormal rows, by descending variance.
        variances: (dT,) float64, all eigenvalues of the covariance, in descending order.
    """

    directions: Tensor
    variances: Tensor

    @property
    def explained_variance(self) -> Tensor:
        """(dT,) the share of the variance along the first 1, 2, .. directions."""
        return self.variances.cumsum(0) / self.variances.sum()


def teacher_basis(statistics: PairStatistics, rank: int) -> TeacherBasis:
    """Compute the top ``rank`` eigenvectors of the teacher's covariance (P_T).

    The sign of each eigenvector makes its largest component positive, so that the same rows give
    the same basis on any machine.

    Raises:
        ConfigError: if there are not more rows than ``rank``, or if any state is not finite.
    """
    if statistics.count <= rank:
        raise ConfigError(
            f"{statistics.count} rows cannot give {rank} principal directions: lower rank, or "
            "raise prompts"
        )
    if not statistics.teacher_scatter.isfinite().all():
        raise ConfigError("the teacher has hidden states that are not finite: use another dtype")
    variances, vectors = torch.linalg.eigh(statistics.teacher_scatter / statistics.count)
    directions = vectors.flip(1).T[:rank]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return TeacherBasis(directions * largest.sign(), variances.flip(0).clamp(min=0))


def ridge(statistics: PairStatistics, directions: Tensor, strength: float) -> Tensor:
    """Compute the P_S (r, dS) that minimises ||P_S h_S - P_T (h_T - mu_T)||^2 + penalty ||P_S||^2.

    The closed form needs H_S'H_S and H_S'(H_T - mu). One Cholesky factor serves every row of P_S.
    Rows do not depend on each other, so a lower rank is a slice.

    Args:
        statistics: statistics of one pair of layers.
        directions: (r, dT) float64, P_T.
        strength: strength of the penalty, in units of the mean squared hidden state:
            trace(H'H) / dS.

    Raises:
        ConfigError: if H_S'H_S is singular to rounding, or not finite.
    """
    gram = statistics.student_gram
    if not gram.isfinite().all():
        raise ConfigError("the student has hidden states that are not finite: use another dtype")
    penalty = strength * gram.diagonal().mean()
    regular = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(regular)
    if info.item():
        raise ConfigError(
            f"the student's {statistics.count} rows do not span its {len(gram)} dimensions to "
            f"float64's rounding, and ridge={strength} is too small to compensate: raise ridge or "
            "prompts"
        )
    return torch.cholesky_solve(statistics.cross @ directions.T, factor).T


def residual_variances(
    statistics: PairStatistics, student_proj: Tensor, directions: Tensor
) -> Tensor:
    """Compute the mean of (P_S h_S - P_T (h_T - mu))^2 over the rows, by direction: (r,) float64.

    In theory, with ``ridge`` and strength -> 0 this is lambda_i (1 - rho_i^2), where lambda_i is
    the variance of direction i and rho_i^2 is the share of it that the student's states explain.
    """
    p, t = student_proj.double(), directions.double()
    own = ((p @ statistics.student_gram) * p).sum(1)
    shared = ((p @ statistics.cross) * t).sum(1)
    wanted = ((t @ statistics.teacher_scatter) * t).sum(1)
    return (own - 2 * shared + wanted) / statistics.count


def student_r2(statistics: PairStatistics, student_proj: Tensor, basis: TeacherBasis) -> Tensor:
    """Compute the share of the variance along the first 1, 2, .., r directions that P_S h_S
    explains: (r,) float64."""
    variances = basis.variances
    left = residual_variances(statistics, student_proj.to(variances.device), basis.directions)
    return 1 - left.cumsum(0) / variances[: len(left)].cumsum(0)


def random_student_proj(rank: int, width: int, seed: int) -> Tensor:
    """Draw a random projector, (r, dS) float32: a student projector before it is fitted.

    Entries are normal with variance 1 / dS, and the same for the same seed. A lower rank is a slice
    of a higher rank.
    """
    generator = torch.Generator().manual_seed(seed)
    # A single call for all rows would give other numbers at another rank.
    rows = [torch.randn(width, generator=generator) for _ in range(rank)]
    return torch.stack(rows) / width**0.5
