"""Output-space distillation (OPD), the baselines: losses between next-token distributions.

Shapes: M supervised tokens (rows), V vocabulary, k of a top-k; student hidden states d wide.
p is the student's distribution, q the teacher's, both at the position that predicts the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oprd.config.types import Form
from oprd.models.lm_head import LMHead, add_product, wide_dtype


@dataclass(frozen=True)
class VocabLoss:
    """One output-space objective.

    Attributes:
        form: ``top1``: reverse KL estimated on the sampled token, as a policy gradient (Eq. 3).
            ``topk``: KL(p||q), both renormalised on the top-k set (Eq. 5). ``topk_advantage``:
            the public code's -sum w (log q - log p) log p with w = p renormalised, a detached
            advantage. ``topk_raw``: sum over the set of p (log p - log q) (section 4.1.1).
            ``full``: KL(p||q) over the vocabulary (Eq. 4); ``full_forward``: KL(q||p).
        k: size of the set; at least 2 for ``topk``, which is 0 for one token.
        support: whose k most probable tokens the set is.
    """

    form: Form
    k: int = 16
    support: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        if self.form == "topk" and self.k < 2:
            raise ValueError(
                f"topk needs k >= 2, got {self.k}: renormalised on one token both distributions "
                "are 1 and the loss is always 0. Use top1"
            )
        if self.form.startswith("topk") and self.k < 1:
            raise ValueError(f"{self.form} needs k >= 1, got {self.k}")

    def row_losses(self, student_MV: Tensor, teacher_MV: Tensor, tokens_M: Tensor) -> Tensor:
        """(M,) losses from float32 (float64) logits; their gradient is the objective's, which for
        the policy-gradient forms is not that of their value.

        Args:
            tokens_M: int64, the tokens that were sampled.
        """
        if self.form == "top1":
            log_p = _log_prob(student_MV, tokens_M[:, None])
            log_q = _log_prob(teacher_MV, tokens_M[:, None])
            return _policy_gradient(log_p, (log_p - log_q).detach()).squeeze(-1)
        if self.form == "full":
            log_p, log_q = student_MV.log_softmax(-1), teacher_MV.log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        if self.form == "full_forward":
            log_p, log_q = student_MV.log_softmax(-1), teacher_MV.log_softmax(-1)
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        top_Mk = (student_MV if self.support == "student" else teacher_MV).topk(self.k).indices
        if self.form == "topk":
            log_p = student_MV.gather(-1, top_Mk).log_softmax(-1)
            log_q = teacher_MV.gather(-1, top_Mk).log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        log_p, log_q = _log_prob(student_MV, top_Mk), _log_prob(teacher_MV, top_Mk)
        if self.form == "topk_raw":
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        weight = log_p.detach().softmax(-1)
        return _policy_gradient(log_p, weight * (log_p - log_q).detach()).sum(-1)


def _log_prob(logits_MV: Tensor, tokens_Mk: Tensor) -> Tensor:
    return logits_MV.gather(-1, tokens_Mk) - logits_MV.logsumexp(-1, keepdim=True)


def _policy_gradient(log_p: Tensor, cost: Tensor) -> Tensor:
    """Has the value ``cost`` and the gradient cost * grad log p: the advantage is -cost."""
    return cost * (log_p - log_p.detach()).exp()


TeacherLogits = Callable[[slice], Tensor]
"""(m, V) teacher logits of a slice of the rows."""


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
    """The loss from the logits of all B * T positions, as verl and TRL compute it.

    Args:
        rows_M: int64, which of the B * T positions predict a supervised token.
        teacher_rows_M: the same of the teacher's; None: the same positions.
        weights_M: of the rows; None: 1.
        denominator: what the weighted sum is divided by.
    """
    student_MV = student_logits_BTV.flatten(0, 1).float()[rows_M]
    teacher_rows_M = rows_M if teacher_rows_M is None else teacher_rows_M
    teacher_MV = teacher_logits_BTV.flatten(0, 1).float()[teacher_rows_M]
    width = min(student_MV.shape[-1], teacher_MV.shape[-1])  # padding of the vocabulary may differ
    losses = loss.row_losses(student_MV[:, :width], teacher_MV[:, :width], tokens_M)
    return _weighted_mean(losses, weights_M, denominator)


def _weighted_mean(losses_M: Tensor, weights_M: Tensor | None, denominator: float) -> Tensor:
    if weights_M is not None:
        losses_M = losses_M * weights_M
    return losses_M.sum() / denominator if denominator else losses_M.sum() * 0.0


def chunked(
    loss: VocabLoss,
    student_Md: Tensor,
    head: LMHead,
    teacher_logits: TeacherLogits,
    tokens_M: Tensor,
    weights_M: Tensor | None,
    denominator: float,
    chunk: int = 256,
) -> Tensor:
    """The same loss from the student's hidden states, ``chunk`` rows at a time: no tensor of M x V.

    The gradients with respect to the states and the head are formed with each chunk's logits and
    kept instead of these.

    Args:
        student_Md: the states that predict the supervised tokens.
        head: the student's LM head; trained if its weight requires a gradient.
        teacher_logits: called for each chunk, without gradient.
    """
    return _Chunked.apply(
        student_Md, head.weight, head.bias, head, loss, teacher_logits, tokens_M, weights_M,
        denominator, chunk,
    )  # fmt: skip


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_Md, weight, bias, head, loss, teacher_logits, tokens_M, weights_M,
        denominator, chunk,
    ):  # fmt: skip
        with torch.autocast(student_Md.device.type, enabled=False):
            return _Chunked._forward(
                ctx, student_Md, weight, bias, head, loss, teacher_logits, tokens_M, weights_M,
                denominator, chunk,
            )  # fmt: skip

    @staticmethod
    def _forward(
        ctx, student_Md, weight, bias, head, loss, teacher_logits, tokens_M, weights_M,
        denominator, chunk,
    ):  # fmt: skip
        wide, operand_Vd = wide_dtype(student_Md.dtype), head.operand(student_Md)
        total = student_Md.new_zeros((), dtype=wide)
        d_student = torch.empty_like(student_Md) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias, dtype=wide)
        for start in range(0, student_Md.shape[0], chunk):
            at = slice(start, min(start + chunk, student_Md.shape[0]))
            products = head.products(student_Md[at].detach(), operand_Vd)
            with torch.enable_grad():
                products.requires_grad_()
                logits = head.logits(products)
                teacher = teacher_logits(at)
                width = min(logits.shape[-1], teacher.shape[-1])
                losses = loss.row_losses(logits[:, :width], teacher[:, :width], tokens_M[at])
                weights = None if weights_M is None else weights_M[at]
                part = _weighted_mean(losses, weights, denominator)
                (d_products,) = torch.autograd.grad(part, products)
            total += part.detach()
            if d_student is not None:
                d_student[at] = head.backward_states(d_products, operand_Vd)
            if d_weight is not None:
                add_product(d_weight, d_products.T, student_Md[at].detach())
            if d_bias is not None:
                d_bias += d_products.sum(0)
        ctx.gradients = (d_student, d_weight, d_bias)
        ctx.dtypes = (student_Md.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss allows one backward: its gradients are used up")
        d_student, d_weight, d_bias = ctx.gradients
        ctx.gradients = None
        wanted = (
            None if g is None else g.mul_(grad).to(dtype)
            for g, dtype in zip((d_student, d_weight, d_bias), ctx.dtypes, strict=True)
        )
        return *wanted, *(None,) * 7
