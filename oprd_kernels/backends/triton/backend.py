"""`TritonBackend`, which allocates memory and starts the launches that `launches` builds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oprd_kernels.backends.triton.geometry import form
from oprd_kernels.backends.triton.launches import (
    INTERPRETED,
    MAX_CHUNKS,
    identity_backward_launch,
    identity_launches,
    project_launches,
    projected_backward_launch,
    projector_gradient_launches,
)
from oprd_kernels.backends.triton.operands import Plan, plan
from oprd_kernels.backends.triton.saved import HEAD, SUMS, TICKET, aligned
from oprd_kernels.call import GradCall, LossCall, num_rows

MAX_LAYERS = 32
"""The most layers in one launch, because their addresses are parameters of the kernel."""


@functools.cache
def _generation(index: int) -> str:
    """Return the generation in `configs` that fits a device best.

    Consumer Blackwell (sm_120) has the shared memory and the tensor-core instructions of the
    generation before Hopper.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def generation(device: torch.device) -> str:
    """Return the generation whose configurations are used for a device."""
    return "sm90" if device.type == "cpu" else _generation(device.index or 0)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than the Ampere generation (sm_80)"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors (compute units) of a device.

    At least as many programs are needed to keep the device busy.
    """
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def new_floats(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    """Allocate float32 memory. The gaps between the parts of ``saved`` are never written."""
    return _no_floats(device).new_empty(shape)


@functools.cache
def _no_floats(device: torch.device) -> Tensor:
    """Return an empty tensor from which `new_floats` allocates.

    This is a third faster than passing a dtype and a device.
    """
    return torch.empty(0, dtype=torch.float32, device=device)


def float32_precision(*dtypes: torch.dtype) -> str:
    """Return the user's precision for products of float32 matrices.

    Without float32 among ``dtypes``, return "highest".
    """
    if torch.float32 not in dtypes:
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the precision was set through the newer API
        newer = torch.backends.cuda.matmul.fp32_precision
        return {"tf32": "high", "bf16": "medium"}.get(newer, "highest")


class TritonBackend:
    """The Triton kernels; see `oprd_kernels.backends.protocol.Backend` for the methods."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this backend can't run on ``device``, or None if it can."""
        if INTERPRETED:
            if device.type == "cpu":
                return None
            return f"with TRITON_INTERPRET=1 it takes tensors on the CPU, not on {device}"
        if device.type != "cuda":
            return f"the triton backend takes tensors on a GPU, not on {device}"
        return _too_old(device)

    def unsupported(self, call: LossCall) -> str | None:
        """Return None: this backend supports every call."""
        return None

    def saved_size(self, call: LossCall) -> int:
        """Return the number of floats in ``saved``; see `saved` and `operands.Plan`."""
        m = call.num_rows
        if call.student_proj is None:
            return HEAD.value + 4 * aligned(m) + MAX_CHUNKS * SUMS.value
        return _saved_plan(call.student, call.student_proj).saved_size(m)

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and ``saved``, as `Backend.forward` does."""
        m = call.num_rows
        student = call.student
        shape = m if call.reduction == "none" else ()
        loss = new_floats(shape, student.device)
        size = self.saved_size(call)
        saved = new_floats(size, student.device)
        if call.student_proj is not None and m:
            _project(call, m, loss, saved)
        else:
            _identity((call,), m, loss, saved, size, grad)
        return loss, saved

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Write or add the gradient of the student, as `Backend.backward_` does."""
        m = num_rows(grad, call.rows)
        if not m:
            return
        if call.student_proj is None:
            row_stride = grad_loss.stride(0) if grad_loss.dim() else 0
            _identity_backward((call,), m, (grad,), accumulate, grad_loss, row_stride, 0)
        else:
            _projected_backward(call, m, grad, accumulate, grad_loss)

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """Return the gradient of student_proj, as `Backend.grad_proj` does."""
        return _projector_gradient(call, grad_loss)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """Return the losses and ``saved``, as `Backend.forward_layers` does.

        Without a projection, alike layers share one launch.
        """
        first = calls[0]
        m = first.num_rows
        device = first.student.device
        losses = new_floats(len(calls), device)
        alike = calls[:1] if first.student_proj is None else calls
        size = max([self.saved_size(call) for call in alike])
        saved = new_floats((len(calls), size), device)
        if first.student_proj is not None and m:
            for n, call in enumerate(calls):
                _project(call, m, losses[n], saved[n])
            return losses, saved
        for begin, end in _alike(calls):
            _identity(calls[begin:end], m, losses[begin:end], saved[begin:end], size, None)
        return losses, saved

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Write the gradients of all students, as `Backend.backward_layers_` does."""
        m = num_rows(grads[0], calls[0].rows)
        if not m:
            return
        if calls[0].student_proj is not None:
            for n, call in enumerate(calls):
                _projected_backward(call, m, grads[n], False, grad_losses[n])
            return
        for begin, end in _alike(calls):
            some, places = calls[begin:end], grad_losses[begin:end]
            stride = grad_losses.stride(0)
            _identity_backward(some, m, tuple(grads[begin:end]), False, places, 0, stride)


def _alike(calls: Sequence[LossCall] | Sequence[GradCall]) -> list[tuple[int, int]]:
    """Return ranges of calls whose states have the same shapes, dtypes and strides.

    Each range is one launch.
    """
    ranges: list[tuple[int, int]] = []
    begin = 0
    kind = None
    for n, call in enumerate(calls):
        student, teacher = call.student, call.teacher  # type: ignore[attr-defined]
        assert student is not None
        assert teacher is not None
        this = form(student), form(teacher)
        if n and (this != kind or n - begin == MAX_LAYERS):
            ranges.append((begin, n))
            begin = n
        kind = this
    ranges.append((begin, len(calls)))
    return ranges


def _identity(
    calls: Sequence[LossCall], m: int, loss: Tensor, saved: Tensor, size: int, grad: Tensor | None
) -> None:
    """Launch forward without a projection.

    ``size`` is the number of floats from layer to layer in ``saved``.
    """
    student, teacher, _, _, _, rows, teacher_rows, weights, denominator, kind, reduction = calls[0]
    device = student.device
    scale, forward, reduce = identity_launches(
        kind, reduction, len(calls), m, size, generation(device), form(student), form(teacher),
        None if grad is None else form(grad),
    )  # fmt: skip
    sums = loss, saved, weights, denominator
    if m:
        if grad is not None and reduction == "mean" and denominator is None and weights is not None:
            saved[TICKET.value].zero_()
            scale(device, sums)  # the gradient needs the scale before all rows have been summed
        students = tuple([call.student for call in calls])
        teachers = tuple([call.teacher for call in calls])
        forward(device, (students, teachers, grad, *sums[:2], rows, teacher_rows, *sums[2:]))
    reduce(device, sums)


def _identity_backward(
    calls: Sequence[GradCall], m: int, grads: tuple[Tensor, ...], accumulate: bool,
    grad_loss: Tensor, row_stride: int, layer_stride: int,
) -> None:  # fmt: skip
    """Launch backward without a projection."""
    _, student, teacher, _, rows, teacher_rows, weights, kind, _ = calls[0]
    assert student is not None
    assert teacher is not None
    grad = grads[0]
    device = grad.device
    launch = identity_backward_launch(
        kind, len(calls), m, accumulate, row_stride, layer_stride, generation(device),
        form(student), form(teacher), form(grad),
    )  # fmt: skip
    students = tuple([call.student for call in calls])
    teachers = tuple([call.teacher for call in calls])
    saved = tuple([call.saved for call in calls])
    states: Any = (students, teachers)  # not None, because there is no projection
    launch(device, (grads, *states, saved, grad_loss, rows, teacher_rows, weights))


def _saved_plan(student: Tensor, proj: Tensor) -> Plan:
    """Return the plan of ``saved``, which does not depend on the teacher."""
    rank, width = proj.shape  # plain numbers, also while a compiler traces shapes
    return plan(int(rank), int(width), 0, student.dtype, student.dtype)


def _project(call: LossCall, m: int, loss: Tensor, saved: Tensor) -> None:
    """Launch forward with a projection."""
    student, teacher, proj, teacher_proj, mean, rows, teacher_rows, weights = call[:8]
    assert proj is not None
    device = student.device
    work_size, prepare, projects, compare = project_launches(
        call.kind, call.reduction, m, proj.shape[0], teacher_proj is not None,
        float32_precision(student.dtype, teacher.dtype), generation(device), processors(device),
        form(student), form(teacher),
    )  # fmt: skip
    work = new_floats(work_size, device)
    prepare(device, (proj, teacher_proj, mean, saved, work))
    denominator = call.denominator
    if compare is None:
        projects[0](
            device,
            (
                student, teacher, mean, loss, saved, work, rows, teacher_rows, weights, denominator,
            ),
        )  # fmt: skip
        return
    for one in projects:
        one(device, (student, teacher, mean, saved, work, rows, teacher_rows, weights))
    compare(
        device,
        (work, student, teacher, mean, loss, saved, teacher_rows, weights, denominator),
    )


def _projected_backward(
    call: GradCall, m: int, grad: Tensor, accumulate: bool, grad_loss: Tensor
) -> None:
    """Launch the gradient of the student with a projection."""
    assert call.student_proj is not None
    device = grad.device
    launch = projected_backward_launch(
        m, call.student_proj.shape[0], accumulate, grad_loss.stride(0) if grad_loss.dim() else 0,
        float32_precision(grad.dtype), generation(device), processors(device), form(grad),
    )  # fmt: skip
    launch(device, (grad, call.saved, grad_loss, call.rows, call.weights))


def _projector_gradient(call: GradCall, grad_loss: Tensor) -> Tensor:
    """Return the gradient of the student's projector."""
    student, proj = call.student, call.student_proj
    assert student is not None
    assert proj is not None
    m, device = num_rows(student, call.rows), student.device
    if not m:
        return torch.zeros_like(proj, memory_format=torch.contiguous_format)
    rank, width = proj.shape
    shape, launch = projector_gradient_launches(
        m, rank, grad_loss.stride(0) if grad_loss.dim() else 0,
        float32_precision(student.dtype), generation(device), processors(device),
        form(student),
    )  # fmt: skip
    partial = new_floats(shape, device)
    launch(device, (partial, student, call.saved, grad_loss, call.rows, call.weights))
    return partial.sum(0)[:rank, :width].to(proj.dtype).contiguous()
