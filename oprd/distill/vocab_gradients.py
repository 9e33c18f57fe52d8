"""The gradients of `oprd.distill.vocab_losses` by the student's logits, by hand and in place.

Shapes: m rows, V vocabulary, k tokens of a top-k set. p is the student's distribution and q the
teacher's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oprd.distill.vocab_losses import VocabLoss, chosen_tokens, log_prob, policy_gradient_of


def gradient_(loss: VocabLoss, student_mV: Tensor, teacher_mV: Tensor, tokens_m: Tensor) -> Tensor:
    """Write the gradient of each row's loss over the student's logits and return the losses, (m,).

    The teacher's logits are overwritten too. One more tensor of their size is allocated at a time,
    with ``jsd`` two.
    ``topk``, whose gradient is 0 outside of its set, is not computed here.

    Args:
        student_mV, teacher_mV: float32 or float64 logits.
        tokens_m: int64, the sampled tokens.
    """
    if loss.form == "full":
        return _reverse_(student_mV, teacher_mV)
    if loss.form == "full_forward":
        return _forward_(student_mV, teacher_mV)
    if loss.form == "jsd":
        return _jsd_(student_mV, teacher_mV)
    if loss.form == "topk":
        raise ValueError("the gradient of topk is not computed over the whole vocabulary")
    if loss.form == "top1" and loss.temperature != 1:
        student_mV /= loss.temperature
        teacher_mV /= loss.temperature
    chosen_mk = chosen_tokens(loss, student_mV, teacher_mV, tokens_m)
    log_q = log_prob(teacher_mV, chosen_mk)
    log_z = student_mV.logsumexp(-1, keepdim=True)
    losses, slope = policy_gradient_of(loss, student_mV.gather(-1, chosen_mk) - log_z, log_q)
    # With slope = dL / d log p of the chosen tokens, dL / ds = slope - p sum(slope).
    student_mV.sub_(log_z).exp_().mul_(-slope.sum(-1, keepdim=True))
    student_mV.scatter_add_(-1, chosen_mk, slope)
    return losses


def _reverse_(student_mV: Tensor, teacher_mV: Tensor) -> Tensor:
    """Of KL(p||q): p (log p - log q - loss)."""
    log_p = student_mV.sub_(student_mV.logsumexp(-1, keepdim=True))
    log_q = teacher_mV.sub_(teacher_mV.logsumexp(-1, keepdim=True))
    gap = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    gap *= p
    losses = gap.sum(-1)
    torch.addcmul(gap, p, losses[:, None], value=-1, out=p)
    return losses


def _forward_(student_mV: Tensor, teacher_mV: Tensor) -> Tensor:
    """Of KL(q||p): p - q."""
    log_p = student_mV.sub_(student_mV.logsumexp(-1, keepdim=True))
    log_q = teacher_mV.sub_(teacher_mV.logsumexp(-1, keepdim=True))
    gap = log_q - log_p
    q = log_q.exp_()
    gap *= q
    log_p.exp_().sub_(q)
    return gap.sum(-1)


def _jsd_(student_mV: Tensor, teacher_mV: Tensor) -> Tensor:
    """Of (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2: p (log p - log m - KL(p||m)) / 2."""
    log_p = student_mV.sub_(student_mV.logsumexp(-1, keepdim=True))
    log_q = teacher_mV.sub_(teacher_mV.logsumexp(-1, keepdim=True))
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    gap = log_q - log_m
    gap *= log_q.exp_()
    of_teacher = gap.sum(-1)
    torch.sub(log_p, log_m, out=gap)
    p = log_p.exp_()
    gap *= p
    of_student = gap.sum(-1)
    torch.addcmul(gap, p, of_student[:, None], value=-1, out=p).div_(2)
    return (of_student + of_teacher) / 2
