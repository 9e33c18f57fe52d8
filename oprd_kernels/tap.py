"""`rep_tap`: the loss at a point that hidden states flow through, inside a model.

Forward leaves the states as they are. Backward adds the loss's gradient, on the supervised rows
only, to the gradient that flows through anyway. Written as a loss beside the model, the same thing
costs a zero-filled tensor as large as all hidden states, and an addition of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels import ops, reference
from oprd_kernels.api import RepLossStats
from oprd_kernels.validate import check_call


def rep_tap(
    h: Tensor,
    teacher: Tensor,
    *,
    student_proj: Tensor | None = None,
    teacher_proj: Tensor | None = None,
    teacher_mean: Tensor | None = None,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    weights: Tensor | None = None,
    kind: str = "nmse",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, RepLossStats]:
    """Attach the representation loss to the hidden states ``h`` as they pass.

    ``h, loss, stats = rep_tap(h, teacher, ...)``: compute on with the ``h`` returned, and add
    ``loss`` to what ``backward`` is called on. The value and every gradient are those of
    `fused_rep_loss` with the same arguments.

    Args: as `fused_rep_loss`, ``h`` being its ``student``.

    Returns:
        ``h`` unchanged; the loss; its `RepLossStats`.

    Raises: as `fused_rep_loss`.
    """
    call = check_call(
        h,
        teacher,
        student_proj=student_proj,
        teacher_proj=teacher_proj,
        teacher_mean=teacher_mean,
        rows=rows,
        teacher_rows=teacher_rows,
        weights=weights,
        kind=kind,
        reduction=reduction,
        denominator=denominator,
        backend=backend,
    )
    if call.backend == "reference":
        loss, stats = reference.rep_loss(*call.op_args())
        return h, loss, RepLossStats.of(stats)
    tapped, loss, stats = _RepTap.apply(*call.op_args())
    if tapped.shape != h.shape:
        tapped = tapped.reshape(h.shape)
    return tapped, loss, RepLossStats.of(stats)


class _RepTap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        h,
        teacher,
        student_proj,
        teacher_proj,
        teacher_mean,
        rows,
        teacher_rows,
        weights,
        denominator,
        kind,
        reduction,
    ):
        loss, row_stats, dz, stats = torch.ops.oprd.rep_loss(
            h,
            teacher,
            student_proj,
            teacher_proj,
            teacher_mean,
            rows,
            teacher_rows,
            weights,
            denominator,
            kind,
            reduction,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ops.save_for_grad(
            ctx, h, teacher, student_proj, row_stats, dz, stats, rows, teacher_rows, weights, kind
        )
        return h, loss, stats

    @staticmethod
    def backward(ctx, grad_h, grad_loss, _grad_stats):
        none = (None,) * 8
        if grad_loss is None:
            return grad_h, None, None, *none
        ops.refuse_double_backward()
        d_student = None
        if ctx.needs_input_grad[0]:
            # A copy, since other branches of the graph may hold the same tensor.
            own = None if grad_h is None else grad_h.clone(memory_format=torch.contiguous_format)
            d_student = ops.grad_student(ctx, grad_loss, into=own)
        d_proj = ops.grad_proj(ctx, grad_loss) if ctx.needs_input_grad[2] else None
        return d_student, None, d_proj, *none
