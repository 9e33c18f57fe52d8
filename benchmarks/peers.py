"""What others do: the same losses written in PyTorch.

Shapes: M rows; student dS wide, teacher dT; r: projector rank; L layers; B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """`nmse` as one writes it down, in float32."""
    s = F.normalize(student.float(), dim=-1)
    t = F.normalize(teacher.float(), dim=-1)
    return (s - t).square().mean()


def eager_projected(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor,
    teacher_proj: Tensor,
    teacher_mean: Tensor,
) -> Tensor:
    """The Bridge's `nmse` (Eq. 14-15), in float32."""
    z_s = student.float() @ student_proj.T
    z_t = (teacher.float() - teacher_mean) @ teacher_proj.T
    return (F.normalize(z_s, dim=-1) - F.normalize(z_t, dim=-1)).square().mean()


def liger(
    student: Tensor, teacher: Tensor, student_proj: Tensor, teacher_proj: Tensor, compiled: bool
) -> Tensor:
    """Liger's chunked cosine distillation loss with the projectors for LM heads: the nearest fused
    thing there is. It works in the states' dtype, has no mean, and gives P_S a gradient too."""
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

    loss = LigerFusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled
    )
    labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
    weights = (p.to(student.dtype) for p in (student_proj, teacher_proj))
    student_weight, teacher_weight = weights
    return loss(student, student_weight, teacher, teacher_weight, labels)


def upstream_way(students: Sequence[Tensor], teachers: Sequence[Tensor], k: int) -> Tensor:
    """The public code's order of work, by method.md's description: every layer cast to float32
    and stacked to (B, L, T, D), then each sample cut to its last k, normalised, subtracted and
    squared."""
    s_BLTD = torch.stack([h.float() for h in students], dim=1)
    t_BLTD = torch.stack([h.float() for h in teachers], dim=1)
    losses = []
    for s_LTD, t_LTD in zip(s_BLTD, t_BLTD, strict=True):
        s = F.normalize(s_LTD[:, -k:], dim=-1)
        t = F.normalize(t_LTD[:, -k:], dim=-1)
        losses.append((s - t).square().mean())
    return torch.stack(losses).mean()
