"""The representation loss in plain PyTorch: the oracle of the tests, the baseline of the
benchmarks, and the ``backend="reference"`` that runs on any device.

Shapes: M supervised rows; student rows dS wide, teacher rows dT; r: projector rank.
Computed in float64 if any input is float64, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels.call import LossCall

EPS = 1e-12
"""Norms are clamped from below to this, as `torch.nn.functional.normalize` does."""


def unit(v_MD: Tensor) -> Tensor:
    """v / max(|v|, EPS) row by row; a row whose norm is at most EPS passes no gradient on."""
    is_zero = v_MD.detach().norm(dim=-1, keepdim=True) <= EPS
    norm = torch.where(is_zero, torch.ones_like(v_MD), v_MD).norm(dim=-1, keepdim=True)
    return torch.where(is_zero, v_MD.detach() / EPS, v_MD / norm)


def row_losses(s_MD: Tensor, t_MD: Tensor, kind: str) -> Tensor:
    """(M,) losses of pairs of rows: Eq. 6 (``mse``), Eq. 14 (``nmse``), or ``cosine``."""
    width = s_MD.shape[-1]
    if kind == "mse":
        return (s_MD - t_MD).square().sum(-1) / width
    distance = (unit(s_MD) - unit(t_MD)).square().sum(-1)
    return distance / (width if kind == "nmse" else 2)


def rep_loss(call: LossCall) -> tuple[Tensor, Tensor]:
    """The loss and its batch statistics.

    Args:
        call: as `oprd_kernels.validate` makes it; float64 too.

    Returns:
        The loss: () or, for reduction "none", (M,). And (5,), detached: mean cosine, mean student
        norm, mean teacher norm, number of rows whose weight is not 0, the reduction's factor.
    """
    student, teacher, student_proj, teacher_proj, teacher_mean = call[:5]
    rows, teacher_rows, weights, denominator, kind, reduction = call[5:]
    dtype = torch.float64 if call.is_double else torch.float32
    s = student.flatten(0, -2) if rows is None else student.flatten(0, -2)[rows]
    t = teacher.detach().flatten(0, -2)
    t = t if teacher_rows is None else t[teacher_rows]
    valid = None if weights is None else weights != 0
    if valid is not None:  # `where` before any arithmetic: NaN in a masked row stays there
        s = torch.where(valid[:, None], s, torch.zeros_like(s))
        t = torch.where(valid[:, None], t, torch.zeros_like(t))
    s, t = s.to(dtype), t.to(dtype)
    with torch.autocast(student.device.type, enabled=False):
        if student_proj is not None:
            if teacher_mean is not None:
                t = t - teacher_mean
            if teacher_proj is not None:
                t = t @ teacher_proj.T
            s = s @ student_proj.T
        losses = row_losses(s, t, kind)
        if weights is not None:
            losses = torch.where(weights != 0, losses * weights, torch.zeros_like(losses))
        scale = _scale(losses, weights, denominator, reduction)
        with torch.no_grad():
            stats = _batch_stats(s.detach(), t, valid, scale)
        if reduction == "none":
            return losses, stats
        total = losses.sum()
        return torch.where(scale == 0, torch.zeros_like(total), total * scale), stats


def _scale(
    losses: Tensor, weights: Tensor | None, denominator: Tensor | None, reduction: str
) -> Tensor:
    """The factor a reduction puts on every row; 0 if it would divide by 0."""
    if reduction != "mean":
        return losses.new_ones(())
    if denominator is None:
        denominator = losses.new_tensor(losses.shape[0]) if weights is None else weights.sum()
    denominator = denominator.to(losses.dtype)
    is_zero = denominator == 0
    return torch.where(is_zero, 0.0, 1.0 / torch.where(is_zero, 1.0, denominator))


def _batch_stats(s: Tensor, t: Tensor, valid: Tensor | None, scale: Tensor) -> Tensor:
    keep = s.new_ones(s.shape[0]) if valid is None else valid.to(s.dtype)
    count = keep.sum()
    cos = (unit(s) * unit(t)).sum(-1)
    per_row = torch.stack([cos, s.norm(dim=-1), t.norm(dim=-1)])
    per_row = torch.where(keep > 0, per_row, torch.zeros_like(per_row))
    means = per_row.sum(1) / count.clamp(min=1)
    return torch.stack([*means, count, scale.to(s.dtype)]).float()
