"""`fused_rep_losses`: the losses of several layers in one launch.

Use this when all hidden states exist at once, as with `output_hidden_states=True`. Inside a model,
`rep_tap` avoids both the list of states and the separate gradient tensors.

Shapes: L layers; M supervised rows; dS and dT: widths of student and teacher; r: projector rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oprd_kernels import ops
from oprd_kernels.api import RepLossStats
from oprd_kernels.backends import reference, registry
from oprd_kernels.call import GradCall, LossCall
from oprd_kernels.ops import DEVICES, LIBRARY, TAGS
from oprd_kernels.validate import check_calls

# These schemas follow the one-layer ops, with a list for each argument that differs between layers.
# The list is empty if the argument is not used.
LIBRARY.define(
    "rep_losses(Tensor[] student, Tensor[] teacher, Tensor[] student_proj, Tensor[] teacher_proj, "
    "Tensor[] teacher_mean, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "Tensor? denominator, str kind, str reduction, str backend) -> (Tensor losses, Tensor saved)",
    tags=TAGS,
)
LIBRARY.define(
    "rep_losses_grad_(Tensor(a!)[] grad, Tensor grad_losses, Tensor[] saved, Tensor[] student, "
    "Tensor[] teacher, Tensor[] student_proj, Tensor? rows, Tensor? teacher_rows, Tensor? weights, "
    "str kind, str reduction, str backend) -> ()",
    tags=TAGS,
)


def _columns(calls: Sequence[tuple], count: int) -> list[list[Tensor]]:
    """Return the first ``count`` fields, which differ between layers, as one list per field."""
    return [
        [x for x in column if x is not None]
        for column in zip(*(call[:count] for call in calls), strict=True)
    ]


def _loss_calls(arguments: Sequence) -> list[LossCall]:
    """Rebuild the calls from the arguments of the op without the backend."""
    columns, shared = arguments[:5], arguments[5:]
    nothing = [None] * len(columns[0])
    layers = zip(*(column or nothing for column in columns), strict=True)
    return [LossCall(*layer, *shared) for layer in layers]


def _rep_losses(*arguments):
    *fields, backend = arguments
    return registry.get(backend).forward_layers(_loss_calls(fields))


@torch.library.register_fake("oprd::rep_losses", lib=LIBRARY)
def _rep_losses_fake(*arguments):
    *fields, backend = arguments
    calls = _loss_calls(fields)
    student, layers = calls[0].student, len(calls)
    size = max(registry.get(backend).saved_size(call) for call in calls)
    return (
        student.new_empty(layers, dtype=torch.float32),
        student.new_empty((layers, size), dtype=torch.float32),
    )


def _rep_losses_grad(grads, grad_losses, *arguments):
    *fields, backend = arguments
    columns, shared = fields[:4], fields[4:]
    nothing = [None] * len(grads)
    layers = zip(*(column or nothing for column in columns), strict=True)
    calls = [GradCall(*layer, *shared) for layer in layers]
    registry.get(backend).backward_layers_(calls, grads, grad_losses)


for _device in DEVICES:
    LIBRARY.impl("rep_losses", _rep_losses, _device)
    LIBRARY.impl("rep_losses_grad_", _rep_losses_grad, _device)


@torch.library.register_fake("oprd::rep_losses_grad_", lib=LIBRARY)
def _rep_losses_grad_fake(grad, *_arguments):
    return None


def _save_for_grad(
    ctx, calls: Sequence[LossCall], saved: Tensor, backend: str, trains_proj: bool
) -> None:
    """Keep for backward what `ops.save_for_grad` keeps, for all layers."""
    first = calls[0]
    projected = first.student_proj is not None
    kept = [call.student_proj for call in calls] if projected else []
    if trains_proj or not projected:
        kept += [call.student for call in calls]
    else:
        ctx.like = [(call.student.shape, call.student.dtype) for call in calls]
    if not projected:
        kept += [call.teacher for call in calls]
    ctx.options = len(calls), projected, trains_proj, first.kind, first.reduction, backend
    ctx.save_for_backward(saved, first.rows, first.teacher_rows, first.weights, *kept)


def _gradients(ctx, grad_losses: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the students and, if they are trained, of their projectors."""
    ops.refuse_double_backward()
    layers, projected, trains_proj, kind, reduction, backend = ctx.options
    saved, rows, teacher_rows, weights, *kept = ctx.saved_tensors
    students = teachers = projs = [None] * layers
    if projected:
        projs, kept = kept[:layers], kept[layers:]
    if trains_proj or not projected:
        students, kept = kept[:layers], kept[layers:]
        make = torch.empty_like if rows is None else torch.zeros_like
        grads = [make(student) for student in students]
    else:
        new = torch.empty if rows is None else torch.zeros
        grads = [new(shape, dtype=dtype, device=saved.device) for shape, dtype in ctx.like]
    if not projected:
        teachers = kept
    shared = rows, teacher_rows, weights, kind, reduction
    layer_fields = zip(saved.unbind(), students, teachers, projs, strict=True)
    calls = [GradCall(*fields, *shared) for fields in layer_fields]
    if ops.runs_directly():
        registry.get(backend).backward_layers_(calls, grads, grad_losses)
    else:
        torch.ops.oprd.rep_losses_grad_(grads, grad_losses, *_columns(calls, 4), *shared, backend)
    if not trains_proj:
        return grads, []
    if ops.runs_directly():
        grad_proj = registry.get(backend).grad_proj
        return grads, [grad_proj(*pair) for pair in zip(calls, grad_losses, strict=True)]
    grad_proj = torch.ops.oprd.rep_loss_grad_proj
    return grads, [grad_proj(g, *call, backend) for g, call in zip(grad_losses, calls, strict=True)]


def _setup_context(ctx, inputs, output) -> None:
    *fields, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes = [len(column) for column in inputs[:5]]
    trains_proj = any(proj.requires_grad for proj in inputs[2])
    _save_for_grad(ctx, _loss_calls(fields), output[1], backend, trains_proj)


def _backward(ctx, grad_losses, _grad_saved):
    grads: list = [[None] * size for size in ctx.sizes]  # lists of tensors get lists of gradients
    if grad_losses is not None:
        grads[0], grads_proj = _gradients(ctx, grad_losses)
        grads[2] = grads_proj or grads[2]
    return *grads, *(None,) * 7


torch.library.register_autograd(
    "oprd::rep_losses", _backward, setup_context=_setup_context, lib=LIBRARY
)


class RepLosses(torch.autograd.Function):
    """``oprd::rep_losses`` with its gradient, without the dispatcher, like `ops.RepLoss`."""

    @staticmethod
    def forward(ctx, calls, backend, *trained):
        """Compute the losses. ``trained`` holds the students, then any student projectors."""
        losses, saved = registry.get(backend).forward_layers(calls)
        trains_proj = any(ctx.needs_input_grad[2 + len(calls) :])
        _save_for_grad(ctx, calls, saved, backend, trains_proj)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        return losses, saved

    @staticmethod
    def backward(ctx, grad_losses, _grad_saved):
        count = len(ctx.needs_input_grad)
        if grad_losses is None:
            return (None,) * count
        grads, grads_proj = _gradients(ctx, grad_losses)
        rest = count - 2 - len(grads) - len(grads_proj)
        return None, None, *grads, *grads_proj, *(None,) * rest


def _rep_losses_of(calls: Sequence[LossCall], backend: str) -> tuple[Tensor, Tensor]:
    """Return the differentiable losses, and ``saved``."""
    if not ops.runs_directly():
        return torch.ops.oprd.rep_losses(*_columns(calls, 5), *calls[0][5:], backend)
    trained: list[Tensor | None] = [call.student for call in calls]
    if calls[0].student_proj is not None:
        trained += [call.student_proj for call in calls]
    return RepLosses.apply(calls, backend, *trained)


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
    """Compute the `fused_rep_loss` of each of L pairs of hidden states.

    Args:
        students: L tensors (..., dS) with the same leading dimensions.
        teachers: L tensors (..., dT), or (..., r).
        student_projs, teacher_projs, teacher_means: L tensors each. All layers have one rank.
        rows, teacher_rows, weights, denominator: Shared by the layers.
        reduction: ``"mean"`` or ``"sum"`` over the rows of each layer.
        kind, backend: The same as in `fused_rep_loss`.
        return_stats: Also return a `RepLossStats` of (L,) tensors.

    Returns:
        (L,) float32 losses. Their mean over layers is OPRD's objective.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: As `fused_rep_loss` does. ValueError
            is also raised for lists that do not match.
    """
    calls = check_calls(
        students,
        teachers,
        student_projs=student_projs,
        teacher_projs=teacher_projs,
        teacher_means=teacher_means,
        rows=rows,
        teacher_rows=teacher_rows,
        weights=weights,
        kind=kind,
        reduction=reduction,
        denominator=denominator,
    )
    chosen = registry.choose(backend, calls)
    if chosen == "reference":
        pairs = [reference.rep_loss(call) for call in calls]
        losses, stats = (torch.stack(column) for column in zip(*pairs, strict=True))
    else:
        losses, stats = _rep_losses_of(calls, chosen)
    if not return_stats:
        return losses
    return losses, RepLossStats(*stats[:, :4].T.clone().unbind())
