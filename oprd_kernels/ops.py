"""The kernels as PyTorch operators, namespace ``oprd``: schemas, fake kernels, autograd.

``oprd::rep_loss``            forward: loss, row statistics, dz, batch statistics
``oprd::rep_loss_grad_``      its gradient with respect to student, written or added into a buffer
``oprd::rep_loss_grad_proj``  its gradient with respect to student_proj
``oprd::rep_loss_in_place_``  forward that leaves the student's gradient in the teacher's memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd_kernels import cpu

_LIBRARY = torch.library.Library("oprd", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIBRARY.define(
    "rep_loss(Tensor student, Tensor teacher, Tensor? student_proj, Tensor? teacher_proj, "
    "Tensor? teacher_mean, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction) "
    "-> (Tensor loss, Tensor row_stats, Tensor dz, Tensor stats)",
    tags=_TAGS,
)
_LIBRARY.define(
    "rep_loss_grad_(Tensor(a!) grad, bool accumulate, Tensor grad_loss, Tensor? student, "
    "Tensor? teacher, Tensor? student_proj, Tensor row_stats, Tensor dz, Tensor stats, "
    "Tensor? rows, Tensor? teacher_rows, Tensor? weights, str kind) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "rep_loss_grad_proj(Tensor grad_loss, Tensor student, Tensor student_proj, Tensor dz, "
    "Tensor stats, Tensor? rows, Tensor? weights) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "rep_loss_in_place_(Tensor student, Tensor(a!) teacher, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction) -> (Tensor loss, Tensor stats)",
    tags=_TAGS,
)


def _f32(proj: Tensor | None) -> Tensor | None:
    return None if proj is None else proj.to(torch.float32).contiguous()


@torch.library.impl(_LIBRARY, "rep_loss", "CPU")
def _rep_loss_cpu(
    student,
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
    return cpu.forward(
        student,
        teacher,
        _f32(student_proj),
        teacher_proj,
        teacher_mean,
        rows,
        teacher_rows,
        weights,
        denominator,
        kind,
        reduction,
    )


@torch.library.register_fake("oprd::rep_loss", lib=_LIBRARY)
def _rep_loss_fake(
    student,
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
    m = cpu.num_rows(student, rows)
    dz_shape = (0,) if student_proj is None else (m, student_proj.shape[0])
    shapes = (() if reduction != "none" else (m,), (m, cpu.ROW_STATS), dz_shape, (cpu.BATCH_STATS,))
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.impl(_LIBRARY, "rep_loss_grad_", "CPU")
def _rep_loss_grad_cpu(
    grad,
    accumulate,
    grad_loss,
    student,
    teacher,
    student_proj,
    row_stats,
    dz,
    stats,
    rows,
    teacher_rows,
    weights,
    kind,
):
    cpu.backward_(
        grad,
        accumulate,
        grad_loss,
        student,
        teacher,
        _f32(student_proj),
        row_stats,
        dz,
        stats,
        rows,
        teacher_rows,
        weights,
        kind,
    )


@torch.library.register_fake("oprd::rep_loss_grad_", lib=_LIBRARY)
def _rep_loss_grad_fake(grad, *_args):
    return None


_PROJ_CHUNK = 1024
"""Rows of student upcast to float32 at a time."""


@torch.library.impl(_LIBRARY, "rep_loss_grad_proj", "CompositeExplicitAutograd")
def _rep_loss_grad_proj(grad_loss, student, student_proj, dz, stats, rows, weights):
    coefficient = grad_loss.float() * stats[cpu.SCALE]
    if weights is not None:
        coefficient = coefficient * weights
    scaled = dz * coefficient.reshape(-1, 1)
    flat = student.flatten(0, -2)
    grad = student_proj.new_zeros(student_proj.shape, dtype=torch.float32)
    for start in range(0, dz.shape[0], _PROJ_CHUNK):
        chunk = slice(start, start + _PROJ_CHUNK)
        h = flat[chunk] if rows is None else flat[rows[chunk]]
        h = h.float()
        if weights is not None:  # 0 * NaN of a masked row would be NaN
            h = torch.where((weights[chunk] != 0)[:, None], h, 0.0)
        grad.addmm_(scaled[chunk].T, h)
    return grad.to(student_proj.dtype)


@torch.library.register_fake("oprd::rep_loss_grad_proj", lib=_LIBRARY)
def _rep_loss_grad_proj_fake(grad_loss, student, student_proj, dz, stats, rows, weights):
    return torch.empty_like(student_proj, memory_format=torch.contiguous_format)


@torch.library.impl(_LIBRARY, "rep_loss_in_place_", "CPU")
def _rep_loss_in_place_cpu(student, teacher, weights, denominator, kind, reduction):
    none = (None,) * 5
    loss, _, _, stats = cpu.forward(
        student, teacher, *none, weights, denominator, kind, reduction, grad=teacher
    )
    return loss, stats


@torch.library.register_fake("oprd::rep_loss_in_place_", lib=_LIBRARY)
def _rep_loss_in_place_fake(student, teacher, weights, denominator, kind, reduction):
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty((cpu.BATCH_STATS,), dtype=torch.float32),
    )


def save_for_grad(ctx, student, teacher, student_proj, row_stats, dz, stats, rows, teacher_rows,
                  weights, kind) -> None:  # fmt: skip
    """Keep what `grad_student` and `grad_proj` need and no more: after a projection the wide
    inputs are dropped, unless the projector itself is trained."""
    keep_student = student_proj is None or ctx.needs_input_grad[2]
    ctx.shape, ctx.dtype, ctx.kind = student.shape, student.dtype, kind
    ctx.save_for_backward(
        student if keep_student else None,
        teacher if student_proj is None else None,
        student_proj,
        row_stats,
        dz,
        stats,
        rows,
        teacher_rows,
        weights,
    )


def refuse_double_backward() -> None:
    """The kernels have no second derivative; say so instead of returning a wrong graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_rep_loss has no second derivative (create_graph=True): use "
            "backend='reference', which is plain PyTorch"
        )


def grad_student(ctx, grad_loss: Tensor, into: Tensor | None = None) -> Tensor:
    """The gradient with respect to student: added into ``into``, or in a new tensor."""
    student, teacher, student_proj, row_stats, dz, stats, rows, teacher_rows, weights = (
        ctx.saved_tensors
    )
    accumulate = into is not None
    if into is None:
        make = torch.empty if rows is None else torch.zeros
        into = make(ctx.shape, dtype=ctx.dtype, device=grad_loss.device)
    torch.ops.oprd.rep_loss_grad_(
        into,
        accumulate,
        grad_loss,
        student if student_proj is None else None,
        teacher,
        student_proj,
        row_stats,
        dz,
        stats,
        rows,
        teacher_rows,
        weights,
        ctx.kind,
    )
    return into


def grad_proj(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient with respect to student_proj, summed over rows in chunks by BLAS."""
    student, _, student_proj, _, dz, stats, rows, _, weights = ctx.saved_tensors
    return torch.ops.oprd.rep_loss_grad_proj(
        grad_loss, student, student_proj, dz, stats, rows, weights
    )


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, student_proj, _, _, rows, teacher_rows, weights, _, kind, _ = inputs
    _, row_stats, dz, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_stats, dz, stats)
    save_for_grad(
        ctx, student, teacher, student_proj, row_stats, dz, stats, rows, teacher_rows, weights, kind
    )


def _backward(ctx, grad_loss, *_unused):
    none = (None,) * 8
    if grad_loss is None:
        return None, None, None, *none
    refuse_double_backward()
    return (
        grad_student(ctx, grad_loss) if ctx.needs_input_grad[0] else None,
        None,
        grad_proj(ctx, grad_loss) if ctx.needs_input_grad[2] else None,
        *none,
    )


torch.library.register_autograd(
    "oprd::rep_loss", _backward, setup_context=_setup_context, lib=_LIBRARY
)
