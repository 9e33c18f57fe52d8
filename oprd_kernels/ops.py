"""The kernels as PyTorch operators, namespace ``oprd``: schemas, fake kernels, autograd.

``oprd::rep_loss``            forward: loss, and what backward needs of it (see `layout`)
``oprd::rep_loss_grad_``      its gradient with respect to student, written or added into a buffer
``oprd::rep_loss_grad_proj``  its gradient with respect to student_proj
``oprd::rep_loss_in_place_``  forward that leaves the student's gradient in the teacher's memory
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oprd_kernels import layout
from oprd_kernels.backends import launcher

LIBRARY = torch.library.Library("oprd", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
DEVICES = ("CPU", "CUDA")
"""Dispatch keys; which kernels run is the ops' last argument, a name of `backends.BACKENDS`."""

LIBRARY.define(
    "rep_loss(Tensor student, Tensor teacher, Tensor? student_proj, Tensor? teacher_proj, "
    "Tensor? teacher_mean, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend) -> (Tensor loss, Tensor saved)",
    tags=TAGS,
)
LIBRARY.define(
    "rep_loss_grad_(Tensor(a!) grad, bool accumulate, Tensor grad_loss, Tensor? student, "
    "Tensor? teacher, Tensor? student_proj, Tensor saved, Tensor? rows, Tensor? teacher_rows, "
    "Tensor? weights, str kind, str backend) -> ()",
    tags=TAGS,
)
LIBRARY.define(
    "rep_loss_grad_proj(Tensor grad_loss, Tensor student, Tensor student_proj, Tensor saved, "
    "Tensor? rows, Tensor? weights) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "rep_loss_in_place_(Tensor student, Tensor(a!) teacher, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend) -> (Tensor loss, Tensor saved)",
    tags=TAGS,
)


def _f32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _rep_loss(student, teacher, student_proj, *rest):
    *options, backend = rest
    return launcher(backend).forward(student, teacher, _f32(student_proj), *options)


for _device in DEVICES:
    LIBRARY.impl("rep_loss", _rep_loss, _device)


@torch.library.register_fake("oprd::rep_loss", lib=LIBRARY)
def _rep_loss_fake(student, teacher, student_proj, *options):
    *_, rows, _, _, _, _, reduction, _ = options
    m = layout.num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    return (
        student.new_empty((m,) if reduction == "none" else (), dtype=torch.float32),
        student.new_empty(layout.saved_size(m, rank, reduction), dtype=torch.float32),
    )


def _rep_loss_grad(grad, accumulate, grad_loss, student, teacher, student_proj, *rest):
    *options, backend = rest
    launcher(backend).backward_(
        grad, accumulate, grad_loss, student, teacher, _f32(student_proj), *options
    )


for _device in DEVICES:
    LIBRARY.impl("rep_loss_grad_", _rep_loss_grad, _device)


@torch.library.register_fake("oprd::rep_loss_grad_", lib=LIBRARY)
def _rep_loss_grad_fake(grad, *_args):
    return None


_PROJ_CHUNK = 1024
"""Rows of student upcast to float32 at a time."""


@torch.library.impl(LIBRARY, "rep_loss_grad_proj", "CompositeExplicitAutograd")
def _rep_loss_grad_proj(grad_loss, student, student_proj, saved, rows, weights):
    m, rank = layout.num_rows(student, rows), student_proj.shape[0]
    coefficient = layout.coefficients(grad_loss, saved, weights)
    scaled = layout.dz_of(saved, m, rank) * coefficient.reshape(-1, 1)
    flat = student.flatten(0, -2)
    grad = student_proj.new_zeros(student_proj.shape, dtype=torch.float32)
    for start in range(0, m, _PROJ_CHUNK):
        chunk = slice(start, start + _PROJ_CHUNK)
        h = flat[chunk] if rows is None else flat[rows[chunk]]
        h = h.float()
        if weights is not None:  # 0 * NaN of a masked row would be NaN
            h = torch.where((weights[chunk] != 0)[:, None], h, 0.0)
        grad.addmm_(scaled[chunk].T, h)
    return grad.to(student_proj.dtype)


@torch.library.register_fake("oprd::rep_loss_grad_proj", lib=LIBRARY)
def _rep_loss_grad_proj_fake(grad_loss, student, student_proj, saved, rows, weights):
    return torch.empty_like(student_proj, memory_format=torch.contiguous_format)


def _rep_loss_in_place(student, teacher, weights, denominator, kind, reduction, backend):
    options = (None,) * 5 + (weights, denominator, kind, reduction)
    return launcher(backend).forward(student, teacher, *options, grad=teacher)


for _device in DEVICES:
    LIBRARY.impl("rep_loss_in_place_", _rep_loss_in_place, _device)


@torch.library.register_fake("oprd::rep_loss_in_place_", lib=LIBRARY)
def _rep_loss_in_place_fake(student, teacher, weights, denominator, kind, reduction, backend):
    saved = layout.saved_size(layout.num_rows(student, None), 0, reduction)
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(saved, dtype=torch.float32),
    )


def save_for_grad(ctx, inputs: Sequence, saved: Tensor, trains_proj: bool) -> None:
    """Keep what `grad_student` and `grad_proj` need of an op's inputs and no more: after a
    projection the wide inputs are dropped, unless the projector itself is trained."""
    student, teacher, student_proj, _, _, rows, teacher_rows, weights, _, kind, _, backend = inputs
    ctx.kind, ctx.backend = kind, backend
    if student_proj is not None:
        ctx.like = (student.shape, student.dtype)
        teacher = None
        if not trains_proj:
            student = None
    ctx.save_for_backward(student, teacher, student_proj, saved, rows, teacher_rows, weights)


def refuse_double_backward() -> None:
    """The kernels have no second derivative; say so instead of returning a wrong graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_rep_loss has no second derivative (create_graph=True): use "
            "backend='reference', which is plain PyTorch"
        )


def grad_student(ctx, grad_loss: Tensor, into: Tensor | None = None) -> Tensor:
    """The gradient with respect to student: added into ``into``, or in a new tensor."""
    student, teacher, student_proj, saved, rows, teacher_rows, weights = ctx.saved_tensors
    accumulate = into is not None
    if into is None:
        if student is not None:
            into = torch.empty_like(student) if rows is None else torch.zeros_like(student)
        else:
            shape, dtype = ctx.like
            make = torch.empty if rows is None else torch.zeros
            into = make(shape, dtype=dtype, device=grad_loss.device)
    if student_proj is not None:
        student = None
    arguments = (into, accumulate, grad_loss, student, teacher, student_proj, saved, rows,
                 teacher_rows, weights, ctx.kind, ctx.backend)  # fmt: skip
    if runs_directly():
        _rep_loss_grad(*arguments)
    else:
        torch.ops.oprd.rep_loss_grad_(*arguments)
    return into


def grad_proj(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient with respect to student_proj, summed over rows in chunks by BLAS."""
    student, _, student_proj, saved, rows, _, weights = ctx.saved_tensors
    return torch.ops.oprd.rep_loss_grad_proj(grad_loss, student, student_proj, saved, rows, weights)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    save_for_grad(ctx, inputs, output[1], ctx.needs_input_grad[2])


def _backward(ctx, grad_loss, _grad_saved):
    grads: list[Tensor | None] = [None] * 12
    if grad_loss is not None:
        refuse_double_backward()
        if ctx.needs_input_grad[0]:
            grads[0] = grad_student(ctx, grad_loss)
        if ctx.needs_input_grad[2]:
            grads[2] = grad_proj(ctx, grad_loss)
    return tuple(grads)


torch.library.register_autograd(
    "oprd::rep_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)


def runs_directly() -> bool:
    """Whether nothing listens to the dispatcher: no compiler, no fake tensors, no mode. The kernels
    may then be called past it, which halves the overhead of a call."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def forward(inputs: Sequence) -> tuple[Tensor, Tensor]:
    """Loss and ``saved`` from inside an autograd.Function; ``inputs`` as the op's."""
    if runs_directly():
        return _rep_loss(*inputs)
    return torch.ops.oprd.rep_loss(*inputs)


def rep_loss_in_place(*inputs) -> tuple[Tensor, Tensor]:
    """Loss and ``saved``, leaving the gradient in the teacher's memory."""
    if runs_directly():
        return _rep_loss_in_place(*inputs)
    return torch.ops.oprd.rep_loss_in_place_(*inputs)


class RepLoss(torch.autograd.Function):
    """``oprd::rep_loss`` with its gradient: what `register_autograd` makes of the op, at a third of
    the overhead."""

    @staticmethod
    def forward(ctx, student, student_proj, others, want_saved):
        """``others``: the rest of the op's inputs, none of which gets a gradient."""
        inputs = (student, others[0], student_proj, *others[1:])
        loss, saved = forward(inputs)
        save_for_grad(ctx, inputs, saved, ctx.needs_input_grad[1])
        ctx.set_materialize_grads(False)
        if not want_saved:  # each output costs a few microseconds
            return loss
        ctx.mark_non_differentiable(saved)
        return loss, saved

    @staticmethod
    def backward(ctx, grad_loss, _grad_saved=None):
        if grad_loss is None:
            return None, None, None, None
        refuse_double_backward()
        needs_student, needs_proj, _, _ = ctx.needs_input_grad
        return (
            grad_student(ctx, grad_loss) if needs_student else None,
            grad_proj(ctx, grad_loss) if needs_proj else None,
            None,
            None,
        )


def rep_loss(inputs: Sequence, want_saved: bool) -> tuple[Tensor, Tensor | None]:
    """Loss and, if wanted, ``saved``, differentiable; ``inputs`` as the op's."""
    if not runs_directly():
        return torch.ops.oprd.rep_loss(*inputs)
    found = RepLoss.apply(inputs[0], inputs[2], (inputs[1], *inputs[3:]), want_saved)
    return found if want_saved else (found, None)
