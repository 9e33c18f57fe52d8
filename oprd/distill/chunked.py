"""Output-space losses from hidden states, without logits of all rows (M, V).

The forward pass takes a chunk of rows at a time: it forms their logits, writes the loss's gradient
over the student's, multiplies it by states and head, and frees it. Gradients are written by hand,
not recorded by autograd, which would keep several (m, V) tensors more. On a GPU two Triton kernels
write them (`oprd.distill.vocab_triton`).

A loss on a renormalised top-k set (``topk``) needs all logits of one model alone, to find the set.
Those of the other, and both products of the gradient, are of k tokens a row.

Shapes: M rows, m of them in a chunk, V vocabulary, k tokens of a top-k set, d hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.distill.vocab_gradients import gradient_
from oprd.distill.vocab_losses import VocabLoss, weighted_mean
from oprd.models.lm_head import HeadRows, LMHead, add_product, wide_dtype

try:
    from oprd.distill import vocab_triton as fused
except ImportError:  # no Triton for this platform
    fused = None  # type: ignore[assignment]

TENSORS = 3
"""The largest number of (m, V) tensors of `wide_dtype` that a chunk holds at once."""
GPU_BYTES = 1 << 30
CPU_BYTES = 1 << 28


def chunk_rows(vocab: int, on_gpu: bool, itemsize: int = 4) -> int:
    """Return the number of rows in a chunk whose temporaries take 1 GiB (on a CPU: 256 MiB).

    With fewer rows the matrix products would starve; each chunk also reads and writes the gradient
    of the whole head once.
    """
    return max(16, (GPU_BYTES if on_gpu else CPU_BYTES) // (TENSORS * vocab * itemsize))


def chunked(
    loss: VocabLoss,
    student_Md: Tensor,
    head: LMHead,
    teacher: HeadRows,
    tokens_M: Tensor,
    weights_M: Tensor | None,
    denominator: float,
    chunk: int | None = None,
) -> Tensor:
    """Compute the loss of `oprd.distill.vocab_losses.materialised` in chunks of rows.

    Args:
        student_Md: the hidden states that predict the supervised tokens.
        head: the student's LM head; it gets a gradient if its weight requires one.
        teacher: the teacher's logits of the same rows.
        tokens_M: int64, the sampled tokens.
        weights_M: weights of the rows; None: all are 1.
        denominator: the weighted sum of the row losses is divided by this.
        chunk: number of rows in a chunk; None: `chunk_rows`.
    """
    rows = HeadRows(head, student_Md)
    if chunk is None:
        itemsize = wide_dtype(student_Md.dtype).itemsize
        chunk = chunk_rows(max(rows.width, teacher.width), student_Md.is_cuda, itemsize)
    return _Chunked.apply(
        student_Md,
        head.weight,
        head.bias,
        rows,
        loss,
        teacher,
        tokens_M,
        weights_M,
        denominator,
        chunk,
    )


class Gradients:
    """Sums the gradients of states, weight and bias over chunks.

    Attributes:
        states_Md, weight_Vd, bias_V: the sums; None where none is needed. The head's are in
            `wide_dtype`.
    """

    def __init__(self, student: HeadRows, needed: tuple[bool, ...]) -> None:
        head, wide = student.head, wide_dtype(student.states_Md.dtype)
        self.student = student
        self.states_Md = torch.empty_like(student.states_Md) if needed[0] else None
        self.weight_Vd = torch.zeros_like(head.weight, dtype=wide) if needed[1] else None
        self.bias_V = None
        if head.bias is not None and needed[2]:
            self.bias_V = torch.zeros_like(head.bias, dtype=wide)

    def add(self, at: slice, products_mV: Tensor) -> None:
        """Add a chunk's, from the gradient of its products of states and weight."""
        rows = self.student
        if self.states_Md is not None:
            self.states_Md[at] = rows.head.backward_states(products_mV, rows.operand_Vd)
        if self.weight_Vd is not None:
            add_product(self.weight_Vd, products_mV.T, rows.states_Md[at])
        if self.bias_V is not None:
            self.bias_V += products_mV.sum(0)

    def add_of(self, at: slice, products_mk: Tensor, tokens_mk: Tensor) -> None:
        """Add a chunk's, whose products have a gradient on k tokens a row."""
        rows = self.student
        if self.states_Md is not None:
            gradient = rows.head.backward_states_of(products_mk, tokens_mk, rows.operand_Vd)
            self.states_Md[at] = gradient
        flat = tokens_mk.flatten()
        if self.weight_Vd is not None:
            states = rows.states_Md[at].to(products_mk.dtype)
            outer_mkd = products_mk[:, :, None] * states[:, None]
            _add_rows(self.weight_Vd, flat, outer_mkd.flatten(0, 1))
        if self.bias_V is not None:
            _add_rows(self.bias_V, flat, products_mk.flatten())


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add to rows of a tensor, in the same order each time."""
    if total.is_cuda:  # where index_add_ is not deterministic, and this sorts
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_Md, *arguments):
        with torch.autocast(student_Md.device.type, enabled=False):
            return _Chunked._forward(ctx, *arguments)

    @staticmethod
    def _forward(
        ctx, weight, bias, student, loss, teacher, tokens_M, weights_M, denominator, chunk
    ):
        states_Md = student.states_Md
        total = states_Md.new_zeros((), dtype=wide_dtype(states_Md.dtype))
        sums = Gradients(student, ctx.needs_input_grad)
        for start in range(0, states_Md.shape[0], chunk):
            at = slice(start, min(start + chunk, states_Md.shape[0]))
            weights = None if weights_M is None else weights_M[at]
            scale = _scale(states_Md[at], weights, denominator)
            if loss.form == "topk":
                losses = _on_the_set(loss, student, teacher, at, scale, sums)
            else:
                losses = _on_all(loss, student, teacher, at, tokens_M[at], scale, sums)
            total += weighted_mean(losses, weights, denominator)
        ctx.gradients = (sums.states_Md, sums.weight_Vd, sums.bias_V)
        ctx.dtypes = (states_Md.dtype, weight.dtype, None if bias is None else bias.dtype)
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


def _scale(states_md: Tensor, weights_m: Tensor | None, denominator: float) -> Tensor:
    """Return the gradient of the mean by each row's loss, (m, 1)."""
    wide = wide_dtype(states_md.dtype)
    factor = 1 / denominator if denominator else 0.0
    if weights_m is None:
        return states_md.new_full((states_md.shape[0], 1), factor, dtype=wide)
    return weights_m.to(wide)[:, None] * factor


def _on_the_set(
    loss: VocabLoss,
    student: HeadRows,
    teacher: HeadRows,
    at: slice,
    scale_m1: Tensor,
    sums: Gradients,
) -> Tensor:
    """Add the gradients of KL(p||q), both renormalised on a top-k set; return the losses (m,)."""
    width = min(student.width, teacher.width)
    first, second = (student, teacher) if loss.support == "student" else (teacher, student)
    values, top = first.logits(at)[:, :width].topk(loss.k)
    others = second.logits_of(at, top)
    ours, theirs = (values, others) if first is student else (others, values)
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    p, gap = log_p.exp(), log_p - log_q
    losses = (p * gap).sum(-1)
    gradient = p * (gap - losses[:, None]) * scale_m1
    sums.add_of(at, gradient * student.head.slope(ours), top)
    return losses


def _on_all(
    loss: VocabLoss,
    student: HeadRows,
    teacher: HeadRows,
    at: slice,
    tokens_m: Tensor,
    scale_m1: Tensor,
    sums: Gradients,
) -> Tensor:
    """Add the gradients of a loss over the whole vocabulary; return the losses (m,)."""
    logits = student.logits(at)
    width = min(student.width, teacher.width)
    theirs = teacher.logits(at)[:, :width]
    can_fuse = fused is not None and loss.form != "jsd"
    if can_fuse and logits.is_cuda and logits.dtype == torch.float32:
        scale, cap = scale_m1 * student.head.scale, student.head.softcap
        dtype = student.operand_Vd.dtype
        losses, gradient = fused.row_gradient(loss, logits, theirs, tokens_m, scale, cap, dtype)
        del logits, theirs
        sums.add(at, gradient)
        return losses
    slope = student.head.slope(logits)
    losses = gradient_(loss, logits[:, :width], theirs, tokens_m)
    del theirs
    logits[:, width:] = 0
    logits *= slope * scale_m1
    sums.add(at, logits)
    return losses
