"""The representation loss in plain PyTorch: the ``"reference"`` backend, which runs on any device.

It is also the oracle of the tests and the baseline of the benchmarks. It computes in float64 if any
input is float64, else in float32.

Shapes: M supervised rows; dS and dT: widths of student and teacher rows; r: projector rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels.call import LossCall

EPS = 1e-12
"""The lower bound of norms, as in `torch.nn.functional.normalize`."""


def unit(v_MD: Tensor) -> Tensor:
    """Return v / max(|v|, EPS) row by row. A row of norm at most EPS gets no gradient."""
    is_zero = v_MD.detach().norm(dim=-1, keepdim=True) <= EPS
    norm = torch.where(is_zero, torch.ones_like(v_MD), v_MD).norm(dim=-1, keepdim=True)
    return torch.where(is_zero, v_MD.detach() / EPS, v_MD / norm)


def row_losses(s_MD: Tensor, t_MD: Tensor, kind: str) -> Tensor:
    """Return the losses (M,) of pairs of rows: Eq. 6 (``mse``), Eq. 14 (``nmse``) or ``cosine``."""
    width = s_MD.shape[-1]
    if kind == "mse":
        return (s_MD - t_MD).square().sum(-1) / width
    distance = (unit(s_MD) - unit(t_MD)).square().sum(-1)
    return distance / (width if kind == "nmse" else 2)


def rep_loss(call: LossCall) -> tuple[Tensor, Tensor]:
    """Compute the loss and its batch statistics.

    Args:
        call: A call that `oprd_kernels.validate` has accepted. It may be float64.

    Returns:
        The loss, () or (M,) for reduction "none", and the detached statistics (5,): mean cosine,
        mean student norm, mean teacher norm, number of rows whose weight is not 0, and the factor
        of the reduction.
    """
    student, teacher, student_proj, teacher_proj, teacher_mean = call[:5]
    rows, teacher_rows, weights, denominator, kind, reduction = call[5:]
    dtype = torch.float64 if call.is_double else torch.float32
    s = student.flatten(0, -2) if rows is None else student.flatten(0, -2)[rows]
    t = teacher.detach().flatten(0, -2)
    t = t if teacher_rows is None else t[teacher_rows]
    valid = None if weights is None else weights != 0
    if valid is not None:  # before any arithmetic, so that NaN in a masked row has no effect
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
    """Return the factor by which the reduction multiplies each row; 0 if it would divide by 0."""
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
