"""Losses between next-token distributions: output-space distillation (OPD), the baselines.

Shapes: M supervised tokens (rows), V vocabulary, k tokens of a top-k set, d hidden width. p is the
student's distribution and q the teacher's, both at the position that predicts the token.
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
    """An output-space objective.

    Attributes:
        form: ``top1``: reverse KL estimated on the sampled token, as a policy gradient (Eq. 3).
            ``topk``: KL(p||q) with both renormalised on the top-k set (Eq. 5).
            ``topk_advantage``: -sum w (log q - log p) log p with w = p renormalised and a detached
            advantage, as in the public OPRD code (github.com/ShenzhiYang2000/OPRD).
            ``topk_raw``: sum over the set of p (log p - log q) (section 4.1.1).
            ``full``: KL(p||q) over the vocabulary (Eq. 4). ``full_forward``: KL(q||p).
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
    """Return ``cost`` with the gradient cost * grad log p, where -cost is the advantage."""
    return cost * (log_p - log_p.detach()).exp()


TeacherLogits = Callable[[slice], Tensor]
"""Returns the teacher's logits (m, V) for a slice of the rows."""


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
    """Compute the same loss from the student's hidden states, without any (M, V) tensor.

    The forward pass computes logits and gradients for ``chunk`` rows at a time. It keeps the
    gradients of states and head for backward, and frees the logits.

    Args:
        student_Md: the hidden states that predict the supervised tokens.
        head: the student's LM head; it gets a gradient if its weight requires one.
        teacher_logits: returns the teacher's logits of a chunk, without gradient.
        tokens_M, weights_M, denominator: as in `materialised`.
        chunk: number of rows in a chunk.
    """
    return _Chunked.apply(
        student_Md,
        head.weight,
        head.bias,
        head,
        loss,
        teacher_logits,
        tokens_M,
        weights_M,
        denominator,
        chunk,
    )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_Md, *arguments):
        with torch.autocast(student_Md.device.type, enabled=False):
            return _Chunked._forward(ctx, student_Md, *arguments)

    @staticmethod
    def _forward(
        ctx,
        student_Md,
        weight,
        bias,
        head,
        loss,
        teacher_logits,
        tokens_M,
        weights_M,
        denominator,
        chunk,
    ):
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
