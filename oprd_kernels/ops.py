"""The kernels as PyTorch operators, namespace ``oprd``: schemas, fake kernels, autograd.

``oprd::rep_loss``            the loss, and the buffer ``saved`` that backward needs
``oprd::rep_loss_grad_``      the gradient of student, written or added into a buffer
``oprd::rep_loss_grad_proj``  the gradient of student_proj
``oprd::rep_loss_in_place_``  the loss, with the student's gradient written over the teacher

Their arguments are the fields of `LossCall` or `GradCall` in order, and the name of a backend. If
nothing observes the dispatcher (`runs_directly`), the backend is called without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, is_grad_enabled
from torch.compiler import is_compiling

from oprd_kernels.backends import registry
from oprd_kernels.call import GradCall, LossCall

LIBRARY = torch.library.Library("oprd", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
DEVICES = ("CPU", "CUDA")
"""Dispatch keys. The last argument of an op, a name of `registry.BACKENDS`, selects the kernels."""

LOSS_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor? student_proj, Tensor? teacher_proj, "
    "Tensor? teacher_mean, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend"
)
GRAD_ARGUMENTS = (
    "Tensor saved, Tensor? student, Tensor? teacher, Tensor? student_proj, Tensor? rows, "
    "Tensor? teacher_rows, Tensor? weights, str kind, str reduction, str backend"
)
LIBRARY.define(f"rep_loss({LOSS_ARGUMENTS}) -> (Tensor loss, Tensor saved)", tags=TAGS)
LIBRARY.define(
    f"rep_loss_grad_(Tensor(a!) grad, bool accumulate, Tensor grad_loss, {GRAD_ARGUMENTS}) -> ()",
    tags=TAGS,
)
LIBRARY.define(f"rep_loss_grad_proj(Tensor grad_loss, {GRAD_ARGUMENTS}) -> Tensor", tags=TAGS)
LIBRARY.define(
    "rep_loss_in_place_(Tensor student, Tensor(a!) teacher, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend) -> (Tensor loss, Tensor saved)",
    tags=TAGS,
)


def _rep_loss(*arguments):
    *fields, backend = arguments
    return registry.get(backend).forward(LossCall(*fields))


@torch.library.register_fake("oprd::rep_loss", lib=LIBRARY)
def _rep_loss_fake(*arguments):
    *fields, backend = arguments
    call = LossCall(*fields)
    return (
        call.student.new_empty(
            (call.num_rows,) if call.reduction == "none" else (), dtype=torch.float32
        ),
        call.student.new_empty(registry.get(backend).saved_size(call), dtype=torch.float32),
    )


def _rep_loss_grad(grad, accumulate, grad_loss, *arguments):
    *fields, backend = arguments
    registry.get(backend).backward_(GradCall(*fields), grad, accumulate, grad_loss)


@torch.library.register_fake("oprd::rep_loss_grad_", lib=LIBRARY)
def _rep_loss_grad_fake(grad, *_arguments):
    return None


def _rep_loss_grad_proj(grad_loss, *arguments):
    *fields, backend = arguments
    return registry.get(backend).grad_proj(GradCall(*fields), grad_loss)


@torch.library.register_fake("oprd::rep_loss_grad_proj", lib=LIBRARY)
def _rep_loss_grad_proj_fake(grad_loss, *arguments):
    *fields, _backend = arguments
    proj: Any = GradCall(*fields).student_proj
    return torch.empty_like(proj)


def _identity_call(student, teacher, weights, denominator, kind, reduction) -> LossCall:
    return LossCall(
        student, teacher, weights=weights, denominator=denominator, kind=kind, reduction=reduction
    )


def _rep_loss_in_place(student, teacher, *arguments):
    *options, backend = arguments
    call = _identity_call(student, teacher, *options)
    return registry.get(backend).forward(call, grad=teacher)


@torch.library.register_fake("oprd::rep_loss_in_place_", lib=LIBRARY)
def _rep_loss_in_place_fake(student, teacher, *arguments):
    *options, backend = arguments
    return _rep_loss_fake(*_identity_call(student, teacher, *options), backend)


for _device in DEVICES:
    LIBRARY.impl("rep_loss", _rep_loss, _device)
    LIBRARY.impl("rep_loss_grad_", _rep_loss_grad, _device)
    LIBRARY.impl("rep_loss_grad_proj", _rep_loss_grad_proj, _device)
    LIBRARY.impl("rep_loss_in_place_", _rep_loss_in_place, _device)


def runs_directly() -> bool:
    """Return whether nothing observes the dispatcher: no compiler, no fake tensors, no mode.

    The kernels may then be called without the dispatcher, which halves the overhead of a call.
    """
    return not is_compiling() and _len_torch_dispatch_stack() == 0


def forward(call: LossCall, backend: str) -> tuple[Tensor, Tensor]:
    """Return the loss and ``saved``, without gradients, for use inside an autograd.Function."""
    if runs_directly():
        return registry.get(backend).forward(call)
    return torch.ops.oprd.rep_loss(*call, backend)


def rep_loss_in_place(call: LossCall, backend: str) -> tuple[Tensor, Tensor]:
    """Return the loss and ``saved``, and write the student's gradient over the teacher.

    The call must have no projectors and no row indices.
    """
    if runs_directly():
        return registry.get(backend).forward(call, grad=call.teacher)
    return torch.ops.oprd.rep_loss_in_place_(*call[:2], *call[7:], backend)


def save_for_grad(ctx, call: LossCall, saved: Tensor, backend: str, trains_proj: bool) -> None:
    """Keep the tensors that `grad_student` and `grad_proj` need.

    After a projection the hidden states are not kept. The exception is the student, which the
    gradient of a trained projector needs.
    """
    student, teacher, proj, _, _, rows, teacher_rows, weights, _, kind, reduction = call
    ctx.options = kind, reduction, backend
    if proj is not None:
        ctx.like = student.shape, student.dtype
        kept = student if trains_proj else None
        ctx.save_for_backward(saved, kept, None, proj, rows, teacher_rows, weights)
    elif rows is None and teacher_rows is None and weights is None:
        ctx.save_for_backward(saved, student, teacher)  # every further argument costs time
    else:
        ctx.save_for_backward(saved, student, teacher, None, rows, teacher_rows, weights)


def _grad_call(ctx) -> tuple[GradCall, str]:
    """Return the call that `save_for_grad` kept, after any saved-tensor hooks, and its backend."""
    kind, reduction, backend = ctx.options
    tensors = ctx.saved_tensors
    if len(tensors) == 3:
        tensors = (*tensors, None, None, None, None)
    return GradCall._make((*tensors, kind, reduction)), backend


def refuse_double_backward() -> None:
    """Raise if autograd builds a graph of the backward pass: the kernels have no derivative."""
    if is_grad_enabled() and not is_compiling():
        raise RuntimeError(
            "fused_rep_loss has no second derivative (create_graph=True): use "
            "backend='reference', which is plain PyTorch"
        )


def grad_student(ctx, grad_loss: Tensor, into: Tensor | None = None) -> Tensor:
    """Return the gradient of student, added into ``into`` or in a new tensor."""
    call, backend = _grad_call(ctx)
    accumulate = into is not None
    if into is None:
        student, rows = call.student, call.rows
        if student is not None:
            into = torch.empty_like(student) if rows is None else torch.zeros_like(student)
        else:
            shape, dtype = ctx.like
            new = torch.empty if rows is None else torch.zeros
            into = new(shape, dtype=dtype, device=grad_loss.device)
    if runs_directly():
        registry.get(backend).backward_(call, into, accumulate, grad_loss)
    else:
        torch.ops.oprd.rep_loss_grad_(into, accumulate, grad_loss, *call, backend)
    return into


def grad_proj(ctx, grad_loss: Tensor) -> Tensor:
    """Return the gradient of student_proj."""
    call, backend = _grad_call(ctx)
    if runs_directly():
        return registry.get(backend).grad_proj(call, grad_loss)
    return torch.ops.oprd.rep_loss_grad_proj(grad_loss, *call, backend)


def _setup_context(ctx, inputs, output) -> None:
    *fields, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    save_for_grad(ctx, LossCall(*fields), output[1], backend, ctx.needs_input_grad[2])


def _backward(ctx, grad_loss, _grad_saved):
    grads: list[Tensor | None] = [None] * (len(LossCall._fields) + 1)
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


class RepLoss(torch.autograd.Function):
    """``oprd::rep_loss`` with its gradient, at a third of the overhead of `register_autograd`."""

    @staticmethod
    def forward(ctx, student, student_proj, call, backend, want_saved):
        """Compute the loss of ``call``.

        ``student`` and ``student_proj`` are also in ``call``. They are separate arguments so that
        autograd sees them.
        """
        loss, saved = registry.get(backend).forward(call)
        trains_proj = student_proj is not None and ctx.needs_input_grad[1]
        save_for_grad(ctx, call, saved, backend, trains_proj)
        ctx.set_materialize_grads(False)
        if not want_saved:  # each output costs a few microseconds
            return loss
        ctx.mark_non_differentiable(saved)
        return loss, saved

    @staticmethod
    def backward(ctx, grad_loss, _grad_saved=None):
        if grad_loss is None:
            return None, None, None, None, None
        refuse_double_backward()
        needs = ctx.needs_input_grad
        d_student = grad_student(ctx, grad_loss) if needs[0] else None
        d_proj = grad_proj(ctx, grad_loss) if needs[1] else None
        return d_student, d_proj, None, None, None


def rep_loss(call: LossCall, backend: str, want_saved: bool) -> tuple[Tensor, Tensor | None]:
    """Return the differentiable loss and, if wanted, ``saved``."""
    if not runs_directly():
        return torch.ops.oprd.rep_loss(*call, backend)
    result = RepLoss.apply(call.student, call.student_proj, call, backend, want_saved)
    return result if want_saved else (result, None)
