"""`fused_rep_loss`: the loss between student and teacher hidden states, fused forward and backward.

Shapes: M supervised rows (tokens); dS and dT: widths of student and teacher; r: projector rank.
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

    The means are over the rows whose weight is not 0. With projectors they describe the projected
    rows z_S and z_T.
    """

    cosine: Tensor
    student_norm: Tensor
    teacher_norm: Tensor
    num_valid: Tensor

    @classmethod
    def of(cls, stats: Tensor) -> RepLossStats:
        """Copy the statistics from the start of ``stats``, so that the rest can be freed."""
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
    """Compute the representation loss of two models' hidden states (OPRD, arXiv 2606.06021).

    Let s and t be a pair of rows (``student_proj @ s`` and ``teacher_proj @ (t - teacher_mean)`` if
    projectors are given), D their width, and v^ = v / max(|v|, 1e-12). The loss of the pair is:

    - ``"mse"``: |s - t|^2 / D (Eq. 6);
    - ``"nmse"``: |s^ - t^|^2 / D = 2 (1 - cos) / D (Eq. 14);
    - ``"cosine"``: |s^ - t^|^2 / 2 = 1 - cos.

    The three kinds differ by large factors (``nmse`` is 2/D of ``cosine``), so a coefficient tuned
    for one does not fit another. The teacher and its projector get no gradient. With ``nmse`` and
    ``cosine``, a student row of norm 0 gets gradient 0.

    All intermediate values are float32. On a GPU, projections use tensor cores. For float32 states
    `torch.get_float32_matmul_precision` sets their precision, as it does for PyTorch's own matrix
    products: ``"highest"`` has at most twice the error of float32 arithmetic; ``"high"`` uses three
    bfloat16 products (16 bits); ``"medium"`` uses one (8 bits). For 16-bit states the error is at
    most an eighth of the error from rounding the states to their dtype. A backend may be more
    exact. The ``"cpu"`` backend is, and so is ``"cuda"`` up to rank 16. The exception is the
    gradient of a trained projector, which these two backends compute with a PyTorch product.

    Args:
        student: (..., dS) float32, bfloat16 or float16, any strides.
        teacher: (..., dT), or (..., r) if it is already projected. Its dtype may differ.
        student_proj: (r, dS). It gets a gradient if it requires one.
        teacher_proj: (r, dT).
        teacher_mean: (dT,).
        rows: (M,) int64. The supervised rows of ``student`` flattened to (N, dS), each at most
            once. The kernel picks these rows itself. Default: all rows.
        teacher_rows: (M,) int64. The same for ``teacher``. Default: all rows, in order.
        weights: (M,) real numbers, or any shape with M elements; they may be negative. A weight
            of 0 masks the row: nothing in it, NaN included, reaches a result. Weights get no
            gradient, and those that require one are refused. To train them, multiply the losses
            of ``"none"`` by them.
        kind: ``"nmse"``, ``"cosine"`` or ``"mse"``.
        reduction: ``"mean"`` (sum of weight * loss over ``denominator``), ``"sum"`` or ``"none"``.
        denominator: Divisor of the mean: a number or 0-D tensor, such as the token count of the
            global batch. Default: the sum of the weights. If it is 0, loss and gradient are 0.
            A negative number, NaN, an infinity, or a number too small for float32 is refused. A
            tensor on a GPU is not read, because that would wait for the device: NaN there makes
            the loss NaN, and a negative number changes its sign. ``OPRD_CHECK=1`` in the
            environment has it read and checked. It gets no gradient either.
        backend: ``"cuda"`` (native CUDA C++), ``"triton"`` (any GPU that Triton supports),
            ``"cpu"`` (native C++) or ``"reference"`` (plain PyTorch, any device, also float64).
            ``"auto"`` takes the first in this order that supports the call.
        inplace: Write the student's gradient over the teacher's memory during forward. This
            destroys the teacher. It needs no further buffer and makes one backward free, with
            upstream gradient 1. Requires equal shapes and dtypes, no projector and no row index.
        return_stats: Also return a `RepLossStats`.

    Returns:
        The loss, float32 (float64 on float64 inputs). It is 0-D, or (M,) for ``"none"``. Without
        ``rows``, ``"none"`` gives it the leading dimensions of ``student``.

    Raises:
        ValueError, TypeError, IndexError: If an argument is invalid. The message says what is
            expected.
        BackendUnavailable: If the requested ``backend`` can't run this call. The message says why.
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
        problem = "a projected loss does not support writing the gradient over the teacher"
    elif call.rows is not None or call.teacher_rows is not None:
        problem = "with rows or teacher_rows the teacher does not have the gradient's shape"
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
    """The loss with its gradient written during forward.

    An autograd.Function is needed because `register_autograd` does not accept mutating ops.
    """

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
                "fused_rep_loss(inplace=True) allows one backward: its buffer has become the "
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
        grad, ctx.grad = ctx.grad, None  # a second reference would make autograd copy it
        return grad, None, None
