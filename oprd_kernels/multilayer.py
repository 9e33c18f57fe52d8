"""`fused_rep_losses`: the losses of several layers in one launch.

For hidden states that are all there at once, as `output_hidden_states=True` gives them. Inside a
model, `rep_tap` needs neither the list nor the gradients beside it.

Shapes: L layers, M supervised rows; student dS wide, teacher dT wide; r: projector rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oprd_kernels import layout, reference
from oprd_kernels.api import RepLossStats
from oprd_kernels.backends import BACKENDS, launcher
from oprd_kernels.ops import DEVICES, LIBRARY, TAGS, refuse_double_backward
from oprd_kernels.validate import Inputs, check_call

LIBRARY.define(
    "rep_losses(Tensor[] student, Tensor[] teacher, Tensor[] student_proj, Tensor[] teacher_proj, "
    "Tensor[] teacher_mean, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend) -> (Tensor losses, Tensor saved)",
    tags=TAGS,
)
LIBRARY.define(
    "rep_losses_grad_(Tensor(a!)[] grad, Tensor grad_losses, Tensor[] student, Tensor[] teacher, "
    "Tensor[] student_proj, Tensor saved, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "str kind, str backend) -> ()",
    tags=TAGS,
)


def _f32(projs: Sequence[Tensor]) -> list[Tensor]:
    return [p.to(torch.float32).contiguous() for p in projs]


def _rep_losses(student, teacher, student_proj, *rest):
    *options, backend = rest
    return launcher(backend).forward_layers(student, teacher, _f32(student_proj), *options)


@torch.library.register_fake("oprd::rep_losses", lib=LIBRARY)
def _rep_losses_fake(student, teacher, student_proj, *options):
    *_, rows, _, _, _, _, reduction, _ = options
    rank = student_proj[0].shape[0] if student_proj else 0
    size = layout.saved_size(layout.num_rows(student[0], rows), rank, reduction)
    layers = len(student)
    return (
        student[0].new_empty(layers, dtype=torch.float32),
        student[0].new_empty(layers, size, dtype=torch.float32),
    )


def _rep_losses_grad(grad, grad_losses, student, teacher, student_proj, *rest):
    *options, backend = rest
    launcher(backend).backward_layers_(
        grad, grad_losses, student, teacher, _f32(student_proj), *options
    )


for _device in DEVICES:
    LIBRARY.impl("rep_losses", _rep_losses, _device)
    LIBRARY.impl("rep_losses_grad_", _rep_losses_grad, _device)


@torch.library.register_fake("oprd::rep_losses_grad_", lib=LIBRARY)
def _rep_losses_grad_fake(grad, *_args):
    return None


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, student_proj, *_, ctx.kind, _, ctx.backend = inputs
    rows, teacher_rows, weights = inputs[5:8]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes = [len(column) for column in inputs[:5]]
    ctx.like = [(s.shape, s.dtype) for s in student]
    # As for one layer: after a projection the wide inputs are dropped unless it is trained.
    ctx.trains_proj = any(p.requires_grad for p in student_proj)
    students = student if ctx.trains_proj or not student_proj else []
    teachers = [] if student_proj else teacher
    ctx.save_for_backward(
        output[1], rows, teacher_rows, weights, *student_proj, *students, *teachers
    )


def _backward(ctx, grad_losses, _grad_saved):
    grads: list = [[None] * size for size in ctx.sizes]  # lists of tensors get lists of gradients
    if grad_losses is not None:
        refuse_double_backward()
        saved, rows, teacher_rows, weights, *rest = ctx.saved_tensors
        layers, projected = ctx.sizes[0], ctx.sizes[2] > 0
        projs, rest = (rest[:layers], rest[layers:]) if projected else ([], rest)
        students, teachers = rest[:layers], rest[layers:]
        make = torch.empty if rows is None else torch.zeros
        grads[0] = [make(shape, dtype=dtype, device=saved.device) for shape, dtype in ctx.like]
        torch.ops.oprd.rep_losses_grad_(
            grads[0],
            grad_losses,
            [] if projected else students,
            teachers,
            projs,
            saved,
            rows,
            teacher_rows,
            weights,
            ctx.kind,
            ctx.backend,
        )
        if ctx.trains_proj:
            grads[2] = [
                torch.ops.oprd.rep_loss_grad_proj(g, h, p, one, rows, weights)
                for g, h, p, one in zip(grad_losses, students, projs, saved, strict=True)
            ]
    return *grads, *(None,) * 7


torch.library.register_autograd(
    "oprd::rep_losses", _backward, setup_context=_setup_context, lib=LIBRARY
)


def fused_rep_losses(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    student_projs: Sequence[Tensor] | None = None,
    teacher_projs: Sequence[Tensor] | None = None,
    teacher_means: Sequence[Tensor] | None = None,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    weights: Tensor | None = None,
    kind: str = "nmse",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RepLossStats]:
    """The losses of L pairs of hidden states, layer by layer those of `fused_rep_loss`.

    Args:
        students: L tensors (..., dS), alike in all but their values.
        teachers: L tensors (..., dT), or (..., r).
        student_projs, teacher_projs, teacher_means: L tensors each; one rank for all layers.
        rows, teacher_rows, weights, denominator: shared by the layers.
        reduction: ``"mean"`` or ``"sum"`` over each layer's rows.
        kind, backend: as `fused_rep_loss`.
        return_stats: also return a `RepLossStats` of (L,) tensors.

    Returns:
        (L,) float32 losses. Their mean over layers is OPRD's objective.

    Raises: as `fused_rep_loss`; ValueError also for lists that do not match.
    """
    layers = len(students)
    lists = {
        "teachers": teachers,
        "student_projs": student_projs,
        "teacher_projs": teacher_projs,
        "teacher_means": teacher_means,
    }
    if layers == 0:
        raise ValueError("students is empty: expected at least one layer")
    for name, column in lists.items():
        if column is not None and len(column) != layers:
            raise ValueError(f"{name} has {len(column)} tensors for {layers} layers of students")
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' for several layers, got 'none'")
    inputs, chosen = [], set()
    for i in range(layers):
        checked, one_chosen = check_call(
            students[i],
            teachers[i],
            student_proj=student_projs[i] if student_projs is not None else None,
            teacher_proj=teacher_projs[i] if teacher_projs is not None else None,
            teacher_mean=teacher_means[i] if teacher_means is not None else None,
            rows=rows,
            teacher_rows=teacher_rows,
            weights=weights,
            kind=kind,
            reduction=reduction,
            denominator=denominator,
            backend=backend,
        )
        inputs.append(checked)
        chosen.add(one_chosen)
        # Checked once, shared by all.
        rows, teacher_rows = checked.rows, checked.teacher_rows
    _check_alike(inputs)
    # One launch, one backend: the one that can do what any layer needs (the last by preference).
    backend = max(chosen, key=BACKENDS.index)
    if backend == "reference":
        pairs = [reference.rep_loss(*one) for one in inputs]
        losses, stats = (torch.stack(column) for column in zip(*pairs, strict=True))
    else:
        columns = [[x for x in column if x is not None] for column in zip(*inputs, strict=True)]
        losses, stats = torch.ops.oprd.rep_losses(*columns[:5], *inputs[0][5:], backend)
    if not return_stats:
        return losses
    return losses, RepLossStats(*stats[:, :4].T.clone().unbind())


def _check_alike(inputs: Sequence[Inputs]) -> None:
    first = inputs[0]
    for i, one in enumerate(inputs):
        ranks = [None if x.student_proj is None else x.student_proj.shape[0] for x in (first, one)]
        if one.student.shape[:-1] != first.student.shape[:-1] or ranks[0] != ranks[1]:
            raise ValueError(
                f"layer {i} has student {tuple(one.student.shape)} and rank {ranks[1]}, layer 0 "
                f"{tuple(first.student.shape)} and {ranks[0]}: rows and rank must be the same"
            )
