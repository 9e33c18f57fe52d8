"""The CPU backend, which launches the native C++ kernels on validated calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from oprd_kernels import native
from oprd_kernels.call import GradCall, LossCall, num_rows
from oprd_kernels.saved_buffer import RowsLayout, coefficients, dz_of, new_layers, new_outputs

BLAS_RANK = 32
"""Above this rank, BLAS computes the products with the projectors, on slices of rows."""
SLICE = 1024
"""Number of rows in a slice. Their float32 copies and products stay in the last-level cache."""


class CpuBackend(RowsLayout):
    """The C++ kernels, with AVX2 if the processor supports it.

    See `oprd_kernels.backends.protocol.Backend` for the methods.
    """

    name = "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this backend can't run on ``device``, or None if it can."""
        if device.type != "cpu":
            return f"the cpu backend takes tensors on the CPU, not on {device}"
        return native.problem()

    def unsupported(self, call: LossCall) -> str | None:
        """Return None: this backend supports every call."""
        return None

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and ``saved``."""
        loss, saved = new_outputs(call, self.saved_size(call))
        if call.rank > BLAS_RANK:
            _forward_slices(call, loss, saved)
        else:
            threads = torch.get_num_threads()
            native.module().forward((call,), grad, loss, saved, threads)
        return loss, saved

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Write or add the gradient of the student; ``grad`` may have any supported dtype."""
        proj = call.student_proj
        if proj is not None and proj.shape[0] > BLAS_RANK:
            _backward_slices(call, proj, grad, accumulate, grad_loss)
        else:
            threads = torch.get_num_threads()
            native.module().backward((call,), (grad,), accumulate, grad_loss, threads)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """Return the losses and ``saved``, from one launch unless BLAS does the products."""
        losses, saved = new_layers(calls[0], len(calls), self.saved_size(calls[0]))
        if calls[0].rank > BLAS_RANK:
            for call, loss, one in zip(calls, losses, saved, strict=True):
                _forward_slices(call, loss, one)
        else:
            native.module().forward(calls, None, losses, saved, torch.get_num_threads())
        return losses, saved

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Write the gradients of all students, in one launch unless BLAS does the products."""
        proj = calls[0].student_proj
        if proj is not None and proj.shape[0] > BLAS_RANK:
            for call, grad, grad_loss in zip(calls, grads, grad_losses, strict=True):
                self.backward_(call, grad, False, grad_loss)
        else:
            threads = torch.get_num_threads()
            native.module().backward(calls, grads, False, grad_losses, threads)


BACKEND = CpuBackend()


class _Slices:
    """Slices of the rows of a tensor as float32 matrices, minus ``mean`` if it is given.

    A slice is a view if the tensor allows one, and otherwise a copy in one shared buffer.
    """

    def __init__(self, x: Tensor, index: Tensor | None, m: int, mean: Tensor | None = None) -> None:
        self.x, self.index, self.mean = x, index, mean
        self.flat: Tensor | None = None
        if x.dtype is torch.float32 and index is None and mean is None and x.stride(-1) == 1:
            self.flat = x if x.dim() == 2 else x.view(m, x.shape[-1]) if x.is_contiguous() else None
        if self.flat is None:
            self.buffer = x.new_empty(min(SLICE, m), x.shape[-1], dtype=torch.float32)

    def __getitem__(self, at: slice) -> Tensor:
        if self.flat is not None:
            return self.flat[at]
        out = self.buffer[: at.stop - at.start]
        threads = torch.get_num_threads()
        native.module().gather(self.x, self.index, self.mean, at.start, out, threads)
        return out


def _slices(m: int) -> Iterator[slice]:
    for start in range(0, m, SLICE):
        yield slice(start, min(start + SLICE, m))


def _forward_slices(call: LossCall, loss: Tensor, saved: Tensor) -> None:
    student, proj, teacher_proj, weights = (
        call.student, call.student_proj, call.teacher_proj, call.weights
    )  # fmt: skip
    assert proj is not None
    m = call.num_rows
    students = _Slices(student, call.rows, m)
    teachers = _Slices(call.teacher, call.teacher_rows, m, call.teacher_mean)
    z_s = student.new_empty(min(SLICE, m), proj.shape[0], dtype=torch.float32)
    z_t = torch.empty_like(z_s)
    threads = torch.get_num_threads()
    for at in _slices(m):
        count = at.stop - at.start
        torch.mm(students[at], proj.T, out=z_s[:count])
        targets = teachers[at]
        if teacher_proj is not None:
            targets = torch.mm(targets, teacher_proj.T, out=z_t[:count])
        projected = LossCall(
            z_s[:count],
            targets,
            weights=None if weights is None else weights[at],
            kind=call.kind,
            reduction=call.reduction,
        )
        native.module().forward_slice(projected, loss, saved, at.start, m, threads)
    native.module().reduce((call,), loss, saved)


def _backward_slices(
    call: GradCall, proj: Tensor, grad: Tensor, accumulate: bool, grad_loss: Tensor
) -> None:
    m = num_rows(grad, call.rows)
    dz = dz_of(call.saved, m, proj.shape[0])
    buffer = dz.new_empty(min(SLICE, m), proj.shape[1])
    threads = torch.get_num_threads()
    for at in _slices(m):
        count = at.stop - at.start
        scaled = dz[at] * coefficients(grad_loss, call.saved, call.weights, at).reshape(-1, 1)
        values = torch.mm(scaled, proj, out=buffer[:count])
        native.module().scatter(call, grad, accumulate, values, at.start, threads)
