"""`fused_rep_loss`: the loss between student and teacher hidden states, forward and backward fused.

Shapes: M supervised rows (tokens); student dS wide, teacher dT wide; r: projector rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oprd_kernels import ops
from oprd_kernels.backends import reference, registry
from oprd_kernels.call import LossCall
from oprd_kernels.validate import check_call


class RepLossStats(NamedTuple):
    """Batch statistics from the same pass as the loss: 0-D float32 tensors without gradient.

    Means are over the rows whose weight is not 0; after a projection they describe z_S and z_T.
    """

    cosine: Tensor
    student_norm: Tensor
    teacher_norm: Tensor
    num_valid: Tensor

    @classmethod
    def of(cls, stats: Tensor) -> RepLossStats:
        """From the vector that begins with them; a copy, so as not to keep all of it alive."""
        return cls(*stats[:4].clone().unbind())


def fused_rep_loss(
    student: Tensor,
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
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RepLossStats]:
    """Representation loss between student and teacher hidden states (OPRD, arXiv 2606.06021).

    With s and t a pair of rows (``student_proj @ s`` and ``teacher_proj @ (t - teacher_mean)`` if
    projectors are given), D their width and v^ = v / max(|v|, 1e-12):

    - ``"mse"``: |s - t|^2 / D (Eq. 6);
    - ``"nmse"``: |s^ - t^|^2 / D = 2 (1 - cos) / D (Eq. 14);
    - ``"cosine"``: |s^ - t^|^2 / 2 = 1 - cos.

    These differ by large factors (``nmse`` is 2/D of ``cosine``): a coefficient tuned for one does
    not fit another. The teacher and its projector get no gradient; a student row of norm 0 gets
    gradient 0 (``nmse``, ``cosine``).

    Everything between the inputs and the outputs is float32. Projections on a GPU use tensor cores:
    for float32 states, `torch.get_float32_matmul_precision` says how exactly, as for PyTorch's
    products: ``"highest"``: with at most twice the error of float32 arithmetic; ``"high"``: three
    bfloat16 products (16 bits); ``"medium"``: one (8 bits). For 16-bit states the error is at most
    an eighth of what rounding the states to their dtype has caused. A backend may always be more
    exact: the CPU's and, up to rank 16, ``"cuda"``'s are, but for the gradient of a projector
    that is trained, which is PyTorch's product there.

    Args:
        student: (..., dS) float32, bfloat16 or float16, any strides.
        teacher: (..., dT), or (..., r) if it is already projected. May differ in dtype.
        student_proj: (r, dS). Trainable: it gets a gradient if it requires one.
        teacher_proj: (r, dT).
        teacher_mean: (dT,).
        rows: (M,) int64: the supervised rows of ``student`` flattened to (N, dS), each at most
            once. They are picked inside the kernel. Default: all.
        teacher_rows: (M,) int64: the same for ``teacher``. Default: its rows, in order.
        weights: (M,), or any shape with M elements. 0 masks the row: whatever it holds, NaN
            included, nothing of it reaches a result.
        kind: ``"nmse"``, ``"cosine"`` or ``"mse"``.
        reduction: ``"mean"`` (sum of weight * loss over ``denominator``), ``"sum"`` or ``"none"``.
        denominator: of the mean: a number or 0-D tensor, such as the token count of the global
            batch. Default: the sum of the weights. If it is 0, so are loss and gradient.
        backend: ``"auto"``: the first that can do this call of ``"cuda"`` (native CUDA C++),
            ``"triton"`` (any GPU that Triton supports), ``"cpu"`` (native C++) and
            ``"reference"`` (plain PyTorch, any device, also float64); or one of these by name.
        inplace: form the student's gradient in forward, over the teacher's memory, which is lost:
            no further buffer, and one backward (with upstream gradient 1) at no cost. Needs equal
            shapes and dtypes, no projector and no row index.
        return_stats: also return a `RepLossStats`.

    Returns:
        The loss, float32 (float64 on float64 inputs): 0-D, or for ``"none"`` (M,), shaped like
        ``student``'s leading dimensions if ``rows`` is not given.

    Raises:
        ValueError, TypeError, IndexError: an argument that does not fit, saying what would.
        BackendUnavailable: a ``backend`` named that can't run here, saying why.
    """
    call = check_call(
        student,
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
    stats: Any
    if inplace:
        _check_inplace(call, chosen, student, teacher)
        loss, stats = _InPlace.apply(call.student, call, chosen)
    elif chosen == "reference":
        loss, stats = reference.rep_loss(call)
    else:
        loss, stats = ops.rep_loss(call, chosen, return_stats)
    if reduction == "none" and rows is None:
        loss = loss.reshape(student.shape[:-1])
    return (loss, RepLossStats.of(stats)) if return_stats else loss


def _check_inplace(call: LossCall, chosen: str, student: Tensor, teacher: Tensor) -> None:
    problem = None
    if chosen == "reference":
        problem = "backend 'reference' (chosen by name or by 'auto') has no in-place kernel"
    elif call.student_proj is not None:
        problem = "a projected loss leaves nothing as wide as the student to write over"
    elif call.rows is not None or call.teacher_rows is not None:
        problem = "with rows or teacher_rows the teacher's memory is not shaped like the gradient"
    elif call.reduction == "none":
        problem = "reduction='none' has no single gradient"
    elif student.shape != teacher.shape or student.dtype != teacher.dtype:
        problem = (
            f"student is {student.dtype} {tuple(student.shape)}, teacher {teacher.dtype} "
            f"{tuple(teacher.shape)}: they must be alike"
        )
    elif not teacher.is_contiguous():
        problem = f"the teacher is not contiguous (strides {teacher.stride()})"
    elif student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        problem = "student and teacher share memory"
    elif teacher.requires_grad and not teacher.is_leaf:
        problem = "the teacher belongs to an autograd graph, which would be corrupted: detach it"
    if problem:
        raise ValueError(f"inplace=True is not possible: {problem}. Pass inplace=False")


class _InPlace(torch.autograd.Function):
    """Gradient-in-forward. `register_autograd` takes no mutating op, hence this."""

    @staticmethod
    def forward(ctx, student, call, backend):
        loss, saved = ops.rep_loss_in_place(call, backend)
        ctx.grad = call.teacher
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return loss, saved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_saved):
        if grad_loss is None:
            return None, None, None
        if ctx.grad is None:
            raise RuntimeError(
                "fused_rep_loss(inplace=True) allows one backward: its buffer now belongs to the "
                "student's gradient. Use inplace=False to call backward again"
            )
        if grad_loss.device.type != "cpu":
            torch._assert_async(grad_loss == 1)
        elif grad_loss.item() != 1:
            raise RuntimeError(
                "fused_rep_loss(inplace=True) folds the reduction into the gradient and allows no "
                f"other upstream gradient than 1, got {grad_loss.item()}. Use inplace=False, or "
                "put the factor into weights or denominator"
            )
        grad, ctx.grad = ctx.grad, None  # no reference kept, so that it need not be copied
        return grad, None, None
