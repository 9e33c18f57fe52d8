"""Losses between next-token distributions: output-space distillation (OPD), the baselines.

Shapes: M supervised tokens (rows), V vocabulary, k tokens of a top-k set, d hidden width. p is the
student's distribution and q the teacher's, both at the position that predicts the token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oprd.config.types import Form


@dataclass(frozen=True)
class VocabLoss:
    """An output-space objective.

    Attributes:
        form: ``top1``: reverse KL estimated on the sampled token, as a policy gradient (Eq. 3).
            ``topk``: KL(p||q) with both renormalised on the top-k set (Eq. 5).
            ``topk_advantage``: -sum w (log q - log p) log p with w = p renormalised and a detached
            advantage, as in the public OPRD code (github.com/ShenzhiYang2000/OPRD).
            ``topk_raw``: sum over the set of p (log p - log q) (section 4.1.1).
            ``full``: KL(p||q) over the vocabulary (Eq. 4). ``full_forward``: KL(q||p). ``jsd``: the
            Jensen-Shannon divergence, (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2.
        k: size of the top-k set; at least 2 for ``topk``, whose loss is 0 on one token.
        support: the model whose k most probable tokens form the set.
        temperature: of ``top1``: the temperature at which the tokens were sampled. Both logits are
            divided by it, or the tokens would not be drawn from p. The other forms do not depend
            on what was sampled and compare the distributions at temperature 1.
    """

    form: Form
    k: int = 16
    support: Literal["student", "teacher"] = "student"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.form == "topk" and self.k < 2:
            raise ValueError(
                f"topk needs k >= 2, got {self.k}: renormalised on one token both distributions "
                "are 1 and the loss is always 0. Use top1"
            )
        if self.form.startswith("topk") and self.k < 1:
            raise ValueError(f"{self.form} needs k >= 1, got {self.k}")

    def row_losses(self, student_MV: Tensor, teacher_MV: Tensor, tokens_M: Tensor) -> Tensor:
        """Return the loss of each row, (M,).

        Backpropagation gives the gradient of the objective. For the policy-gradient forms this is
        not the gradient of the returned value.

        Args:
            student_MV, teacher_MV: float32 or float64 logits.
            tokens_M: int64, the sampled tokens.
        """
        if self.form == "top1":
            if self.temperature != 1:
                student_MV = student_MV / self.temperature
                teacher_MV = teacher_MV / self.temperature
            log_p = log_prob(student_MV, tokens_M[:, None])
            log_q = log_prob(teacher_MV, tokens_M[:, None])
            return _policy_gradient(log_p, (log_p - log_q).detach()).squeeze(-1)
        if self.form == "full":
            log_p, log_q = student_MV.log_softmax(-1), teacher_MV.log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        if self.form == "full_forward":
            log_p, log_q = student_MV.log_softmax(-1), teacher_MV.log_softmax(-1)
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        if self.form == "jsd":
            log_p, log_q = student_MV.log_softmax(-1), teacher_MV.log_softmax(-1)
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            parts = [(log_x.exp() * (log_x - log_m)).sum(-1) for log_x in (log_p, log_q)]
            return (parts[0] + parts[1]) / 2
        top_Mk = chosen_tokens(self, student_MV, teacher_MV, tokens_M)
        if self.form == "topk":
            log_p = student_MV.gather(-1, top_Mk).log_softmax(-1)
            log_q = teacher_MV.gather(-1, top_Mk).log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        log_p, log_q = log_prob(student_MV, top_Mk), log_prob(teacher_MV, top_Mk)
        if self.form == "topk_raw":
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        weight = log_p.detach().softmax(-1)
        return _policy_gradient(log_p, weight * (log_p - log_q).detach()).sum(-1)


def log_prob(logits_MV: Tensor, tokens_Mk: Tensor) -> Tensor:
    """Return the log-probabilities of k tokens in each row, (M, k)."""
    return logits_MV.gather(-1, tokens_Mk) - logits_MV.logsumexp(-1, keepdim=True)


def chosen_tokens(
    loss: VocabLoss, student_MV: Tensor, teacher_MV: Tensor, tokens_M: Tensor
) -> Tensor:
    """Return the tokens of each row whose log-probabilities make up a loss, (M, k)."""
    if loss.form == "top1":
        return tokens_M[:, None]
    return (student_MV if loss.support == "student" else teacher_MV).topk(loss.k).indices


def policy_gradient_of(
    loss: VocabLoss, log_p_Mk: Tensor, log_q_Mk: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses (M,) and their slopes, dL / d log p, by the chosen tokens (M, k).

    Of ``top1`` (whose slope is by the logits before they are divided by the temperature),
    ``topk_advantage`` and ``topk_raw``.
    """
    gap = log_p_Mk - log_q_Mk
    if loss.form == "top1":
        cost, slope = gap, gap / loss.temperature
    elif loss.form == "topk_advantage":
        cost = slope = log_p_Mk.softmax(-1) * gap
    elif loss.form == "topk_raw":
        p = log_p_Mk.exp()
        cost, slope = p * gap, p * (gap + 1)
    else:
        raise ValueError(f"{loss.form} is not a loss of chosen tokens")
    return cost.sum(-1), slope


def _policy_gradient(log_p: Tensor, cost: Tensor) -> Tensor:
    """Return ``cost`` with the gradient cost * grad log p, where -cost is the advantage."""
    return cost * (log_p - log_p.detach()).exp()


def materialised(
    loss: VocabLoss,
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    rows_M: Tensor,
    tokens_M: Tensor,
    weights_M: Tensor | None,
    denominator: float,
    teacher_rows_M: Tensor | None = None,
) -> Tensor:
    """Compute the loss from the logits of all B * T positions, as verl and TRL do.

    Args:
        rows_M: int64, the positions (of B * T) that predict a supervised token.
        tokens_M: int64, the sampled tokens.
        weights_M: weights of the rows; None: all are 1.
        denominator: the weighted sum of the row losses is divided by this.
        teacher_rows_M: int64, the teacher's positions for the same tokens; None: ``rows_M``.
    """
    student_MV = student_logits_BTV.flatten(0, 1).float()[rows_M]
    teacher_rows_M = rows_M if teacher_rows_M is None else teacher_rows_M
    teacher_MV = teacher_logits_BTV.flatten(0, 1).float()[teacher_rows_M]
    width = min(student_MV.shape[-1], teacher_MV.shape[-1])  # tables may differ in padding
    losses = loss.row_losses(student_MV[:, :width], teacher_MV[:, :width], tokens_M)
    return weighted_mean(losses, weights_M, denominator)


def weighted_mean(losses_M: Tensor, weights_M: Tensor | None, denominator: float) -> Tensor:
    """Return the weighted sum of row losses over ``denominator``; 0 if that is 0."""
    if weights_M is not None:
        losses_M = losses_M * weights_M
    return losses_M.sum() / denominator if denominator else losses_M.sum() * 0.0
