"""`rep_tap`: the representation loss, attached to hidden states inside a model.

Forward returns the states unchanged. Backward adds the gradient of the loss, on the supervised rows
only, to the gradient that flows back through the states. A loss computed outside the model would
also need a zero-filled tensor as large as all hidden states, and the addition of both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oprd_kernels import ops
from oprd_kernels.api import RepLossStats
from oprd_kernels.backends import reference, registry
from oprd_kernels.ownership import may_add_into
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
    return_stats: bool = False,
) -> tuple[Any, ...]:
    """Attach the representation loss to the hidden states ``h``.

    Call ``h, loss = rep_tap(h, teacher, ...)``, continue the model with the returned ``h``, and add
    ``loss`` to the loss on which ``backward`` is called. The value and all gradients equal those of
    `fused_rep_loss` with the same arguments. Backward adds to the incoming gradient in place if
    nothing else holds that tensor, and to a copy otherwise.

    Args:
        h: The hidden states; ``student`` in `fused_rep_loss`. All other arguments are those of
            `fused_rep_loss`.

    Returns:
        ``h`` unchanged, the loss, and with ``return_stats`` its `RepLossStats`.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: As `fused_rep_loss` does.
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
    )
    chosen = registry.choose(backend, (call,))
    if chosen == "reference":
        tapped = h
        loss, *stats = reference.rep_loss(call)
    else:
        tapped, loss, *stats = _RepTap.apply(
            call.student, call.student_proj, call, chosen, return_stats
        )
        if tapped.shape != h.shape:
            tapped = tapped.reshape(h.shape)
    return (tapped, loss, RepLossStats.of(stats[0])) if return_stats else (tapped, loss)


class _RepTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, student_proj, call, backend, want_saved):
        loss, saved = ops.forward(call, backend)
        trains_proj = student_proj is not None and ctx.needs_input_grad[1]
        ops.save_for_grad(ctx, call, saved, backend, trains_proj)
        ctx.set_materialize_grads(False)
        if not want_saved:
            return h, loss
        ctx.mark_non_differentiable(saved)
        return h, loss, saved

    @staticmethod
    def backward(ctx, grad_h, grad_loss, _grad_saved=None):
        if grad_loss is None:
            return grad_h, None, None, None, None
        ops.refuse_double_backward()
        needs_student, needs_proj, _, _, _ = ctx.needs_input_grad
        d_student = None
        if needs_student:
            # A compiled graph is functional, and the compiler knows all other readers of grad_h.
            compiling = torch.compiler.is_compiling()
            if grad_h is not None and not compiling and not may_add_into(grad_h):
                grad_h = grad_h.clone(memory_format=torch.contiguous_format)
            d_student = ops.grad_student(ctx, grad_loss, into=grad_h)
        d_proj = ops.grad_proj(ctx, grad_loss) if needs_proj else None
        return d_student, d_proj, None, None, None
