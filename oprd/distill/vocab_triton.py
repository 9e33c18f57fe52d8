"""The gradients of `oprd.distill.vocab_gradients` on a GPU, in two kernels.

`_statistics` reads both models' logits once and sums each row as it goes. `_gradient` reads them
again and writes the gradient, scaled and in the dtype that the head's matrix products take. PyTorch
needs about ten passes over tensors of the logits' size for the same.

Shapes: m rows; V the width of the student's head, W <= V that of both models' vocabulary; k tokens
of a top-k set.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oprd.distill.vocab_losses import VocabLoss, chosen_tokens, policy_gradient_of

SUMMED = ("full", "full_forward")
"""Forms that are sums over the vocabulary; the others are losses of chosen tokens."""

BLOCK = 2048
WARPS = 8
UNSEEN = tl.constexpr(-1e38)
"""The logit of columns beyond the vocabulary. It is finite: its difference from itself is 0."""


@triton.jit
def _merge(top, total, dot, x, gap, seen):
    """Add a block to the running sums of each lane: exp(x) and exp(x) * gap, relative to exp(top).

    Each lane keeps its own maximum, so that nothing is exchanged between them inside the loop.
    """
    higher = tl.maximum(top, x)
    shrink = tl.exp(top - higher)
    e = tl.where(seen, tl.exp(x - higher), 0.0)
    return higher, total * shrink + e, dot * shrink + e * gap


@triton.jit
def _finish(top, total, dot):
    """Return the row's log-sum-exp, and the mean of the gaps under its softmax."""
    highest = tl.max(top, 0)
    shrink = tl.exp(top - highest)
    sum_ = tl.sum(total * shrink, 0)
    return highest + tl.log(sum_), tl.sum(dot * shrink, 0) / sum_


@triton.jit
def _statistics(
    student,
    teacher,
    lse_s_out,
    lse_t_out,
    loss_out,
    width,
    stride_s,
    stride_t,
    inverse_temperature,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's log-sum-exps, and the loss of the forms that sum over the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    lowest = tl.full((BLOCK,), UNSEEN, tl.float32)
    zeros = tl.zeros((BLOCK,), tl.float32)
    top_s, total_s, dot_s = lowest, zeros, zeros
    top_t, total_t, dot_t = lowest, zeros, zeros
    for start in range(0, width, BLOCK):
        at = start + lanes
        seen = at < width
        s = tl.load(student + row * stride_s + at, mask=seen, other=UNSEEN) * inverse_temperature
        t = tl.load(teacher + row * stride_t + at, mask=seen, other=UNSEEN) * inverse_temperature
        top_s, total_s, dot_s = _merge(top_s, total_s, dot_s, s, s - t, seen)
        top_t, total_t, dot_t = _merge(top_t, total_t, dot_t, t, t - s, seen)
    lse_s, mean_s = _finish(top_s, total_s, dot_s)
    lse_t, mean_t = _finish(top_t, total_t, dot_t)
    tl.store(lse_s_out + row, lse_s)
    tl.store(lse_t_out + row, lse_t)
    if FORM == "full":
        tl.store(loss_out + row, mean_s - lse_s + lse_t)
    if FORM == "full_forward":
        tl.store(loss_out + row, mean_t - lse_t + lse_s)


@triton.jit
def _gradient(
    student,
    teacher,
    out,
    lse_s_in,
    lse_t_in,
    factor_in,
    scale_in,
    width,
    full_width,
    stride_s,
    stride_t,
    stride_out,
    inverse_temperature,
    inverse_cap,
    FORM: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the head's products. ``factor_in``: the loss, or the sum of slopes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = at < width
    logit = tl.load(student + row * stride_s + at, mask=seen, other=0.0)
    log_p = tl.where(seen, logit * inverse_temperature - tl.load(lse_s_in + row), UNSEEN)
    p = tl.exp(log_p)
    factor = tl.load(factor_in + row)
    if FORM == "chosen":
        gradient = -p * factor
    else:
        t = tl.load(teacher + row * stride_t + at, mask=seen, other=UNSEEN)
        log_q = t * inverse_temperature - tl.load(lse_t_in + row)
        gradient = p * (log_p - log_q - factor) if FORM == "full" else p - tl.exp(log_q)
    gradient *= tl.load(scale_in + row)
    if CAPPED:
        share = logit * inverse_cap
        gradient *= 1 - share * share
    gradient = tl.where(seen, gradient, 0.0)
    tl.store(out + row * stride_out + at, gradient.to(out.dtype.element_ty), mask=at < full_width)


def row_gradient(
    loss: VocabLoss,
    student_mV: Tensor,
    teacher_mW: Tensor,
    tokens_m: Tensor,
    scale_m1: Tensor,
    cap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the losses, (m,), and the scaled gradient of the head's products, (m, V).

    ``topk``, whose gradient is 0 outside of its set, is not computed here.

    Args:
        student_mV: the student's float32 logits; overwritten by the gradient if ``dtype`` is
            float32.
        teacher_mW: the teacher's; only the first W columns count for either model.
        tokens_m: int64, the sampled tokens.
        scale_m1: float32, what each row's gradient is multiplied by.
        cap: the head's cap on logits, through which the gradient goes back; None: no cap.
        dtype: dtype of the gradient.
    """
    m, full_width = student_mV.shape
    width = teacher_mW.shape[1]
    form = loss.form if loss.form in SUMMED else "chosen"
    inverse_temperature = 1 / loss.temperature if loss.form == "top1" else 1.0
    lse_s, lse_t, factor = (student_mV.new_empty(m) for _ in range(3))
    _statistics[(m,)](
        student_mV,
        teacher_mW,
        lse_s,
        lse_t,
        factor,
        width,
        student_mV.stride(0),
        teacher_mW.stride(0),
        inverse_temperature,
        FORM=form,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    losses, chosen = factor, None
    if form == "chosen":
        chosen = chosen_tokens(loss, student_mV[:, :width], teacher_mW, tokens_m)
        logits_mk = student_mV.gather(-1, chosen)
        log_p = logits_mk * inverse_temperature - lse_s[:, None]
        log_q = teacher_mW.gather(-1, chosen) * inverse_temperature - lse_t[:, None]
        losses, slope = policy_gradient_of(loss, log_p, log_q)
        factor = slope.sum(-1)
        at_chosen = (slope - log_p.exp() * factor[:, None]) * scale_m1
        if cap is not None:
            at_chosen *= 1 - (logits_mk / cap).square()
    out = (
        student_mV
        if dtype == student_mV.dtype
        else student_mV.new_empty(m, full_width, dtype=dtype)
    )
    _gradient[(m, triton.cdiv(full_width, BLOCK))](
        student_mV,
        teacher_mW,
        out,
        lse_s,
        lse_t,
        factor,
        scale_m1.reshape(m),
        width,
        full_width,
        student_mV.stride(0),
        teacher_mW.stride(0),
        out.stride(0),
        inverse_temperature,
        0.0 if cap is None else 1 / cap,
        FORM=form,
        CAPPED=cap is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    if chosen is not None:
        out.scatter_(-1, chosen, at_chosen.to(dtype))
    return losses, out
