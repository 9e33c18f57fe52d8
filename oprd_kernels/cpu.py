"""Launches the native CPU kernels on tensors that `oprd_kernels.validate` has accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oprd_kernels.backends import native
from oprd_kernels.layout import coefficients, dz_of, new_outputs, num_rows, saved_size
from oprd_kernels.packing import address, pack_layer, pack_rows, pack_shared

BLAS_RANK = 32
"""Above this rank the products with the projectors are BLAS's, on slices of rows."""
SLICE = 1024
"""Rows in a slice: their float32 copies and products stay in the last-level cache."""


def forward(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    kind: str,
    reduction: str,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and ``saved``.

    ``grad``, if given, receives the gradient of the reduced loss with respect to ``student``;
    it may be ``teacher`` itself.
    """
    m = num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    each = reduction == "none"
    loss, saved = new_outputs(student, m, rank, reduction)
    shared = pack_shared(m, rows, teacher_rows, weights, kind)
    if rank > BLAS_RANK:
        _forward_slices(
            loss, saved, m, each, student, teacher, student_proj, teacher_proj, teacher_mean,
            rows, teacher_rows, weights, kind,
        )  # fmt: skip
        reduced = (address(denominator), reduction == "mean", each)
        native().reduce(shared, *reduced, loss.data_ptr(), saved.data_ptr())
        return loss, saved
    native().forward(
        [pack_layer(student, teacher, student_proj, teacher_proj, teacher_mean, grad)],
        shared,
        address(denominator),
        reduction == "mean",
        each,
        loss.data_ptr(),
        saved.data_ptr(),
        saved.shape[0],
    )
    return loss, saved


class _Slices:
    """Slices of the rows of a tensor as float32 matrices, less ``mean``: views where they are that
    already, else copies in one buffer."""

    def __init__(self, x: Tensor, index: Tensor | None, m: int, mean: Tensor | None = None) -> None:
        self.x, self.index, self.mean = x, index, mean
        self.flat: Tensor | None = None
        if x.dtype is torch.float32 and index is None and mean is None and x.stride(-1) == 1:
            self.flat = x if x.dim() == 2 else x.view(m, -1) if x.is_contiguous() else None
        if self.flat is None:
            self.buffer = x.new_empty(min(SLICE, m), x.shape[-1], dtype=torch.float32)

    def __getitem__(self, at: slice) -> Tensor:
        if self.flat is not None:
            return self.flat[at]
        count = at.stop - at.start
        out = self.buffer[:count]
        native().gather(
            pack_rows(self.x),
            address(self.index),
            at.start,
            count,
            self.x.shape[-1],
            address(self.mean),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def _slices(m: int) -> Iterator[slice]:
    for start in range(0, m, SLICE):
        yield slice(start, min(start + SLICE, m))


def _forward_slices(
    loss, saved, m, each, student, teacher, student_proj, teacher_proj, teacher_mean, rows,
    teacher_rows, weights, kind,
) -> None:  # fmt: skip
    rank = student_proj.shape[0]
    students = _Slices(student, rows, m)
    teachers = _Slices(teacher, teacher_rows, m, teacher_mean)
    z_s = student.new_empty(min(SLICE, m), rank, dtype=torch.float32)
    z_t = torch.empty_like(z_s)
    for at in _slices(m):
        count = at.stop - at.start
        torch.mm(students[at], student_proj.T, out=z_s[:count])
        targets = teachers[at]
        if teacher_proj is not None:
            targets = torch.mm(targets, teacher_proj.T, out=z_t[:count])
        shared = pack_shared(count, None, None, None if weights is None else weights[at], kind)
        layer = pack_layer(z_s[:count], targets, rank=rank)
        native().forward_slice(layer, shared, m, at.start, each, loss.data_ptr(), saved.data_ptr())


def backward_(
    grad: Tensor,
    accumulate: bool,
    grad_loss: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    student_proj: Tensor | None,
    saved: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
) -> None:
    """Writes (or adds) the gradient of the loss into the supervised rows of ``grad``.

    ``grad`` has the student's shape and any of the supported dtypes; other rows are not touched.
    ``grad_loss`` is a float32 scalar, or (M,) for reduction "none". After a projection the
    gradient follows from dz alone: student and teacher may be None.
    """
    m = num_rows(grad, rows)
    each = grad_loss.dim() > 0
    student = grad if student is None else student
    teacher = student if teacher is None else teacher
    shared = pack_shared(m, rows, teacher_rows, weights, kind)
    layer = pack_layer(student, teacher, student_proj, grad=grad)
    if student_proj is not None and student_proj.shape[0] > BLAS_RANK:
        return _backward_slices(grad, accumulate, grad_loss, student_proj, saved, m, weights, layer,
                                shared)  # fmt: skip
    native().backward(
        [layer],
        shared,
        grad_loss.data_ptr(),
        grad_loss.stride(0) if each else 0,
        0,
        each,
        saved.data_ptr(),
        saved.shape[0],
        accumulate,
    )


def _backward_slices(
    grad, accumulate, grad_loss, student_proj, saved, m, weights, layer, shared
) -> None:
    dz = dz_of(saved, m, student_proj.shape[0])
    buffer = dz.new_empty(min(SLICE, m), student_proj.shape[1])
    for at in _slices(m):
        count = at.stop - at.start
        scaled = dz[at] * coefficients(grad_loss, saved, weights, at).reshape(-1, 1)
        values = torch.mm(scaled, student_proj, out=buffer[:count])
        native().scatter(layer, shared, values.data_ptr(), at.start, count, accumulate)


def forward_layers(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_projs: Sequence[Tensor],
    teacher_projs: Sequence[Tensor],
    teacher_means: Sequence[Tensor],
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    kind: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(L,) losses and (L, saved_size) in one launch; empty sequences for what is not used."""
    m = num_rows(students[0], rows)
    rank = student_projs[0].shape[0] if student_projs else 0
    layers = len(students)
    losses = students[0].new_empty(layers, dtype=torch.float32)
    saved = students[0].new_empty(layers, saved_size(m, rank, reduction), dtype=torch.float32)
    columns = (student_projs, teacher_projs, teacher_means)
    options: list[list[Any]] = [[c[i] if c else None for c in columns] for i in range(layers)]
    if rank > BLAS_RANK:
        shared = (rows, teacher_rows, weights, denominator, kind, reduction)
        for i in range(layers):
            proj, teacher_proj, mean = options[i]
            losses[i], saved[i] = forward(
                students[i], teachers[i], proj, teacher_proj, mean, *shared
            )
        return losses, saved
    native().forward(
        [pack_layer(students[i], teachers[i], *options[i]) for i in range(layers)],
        pack_shared(m, rows, teacher_rows, weights, kind),
        address(denominator),
        reduction == "mean",
        False,
        losses.data_ptr(),
        saved.data_ptr(),
        saved.shape[1],
    )
    return losses, saved


def backward_layers_(
    grads: Sequence[Tensor],
    grad_losses: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    student_projs: Sequence[Tensor],
    saved: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
) -> None:
    """Writes the gradients of sum_l grad_losses[l] * loss[l] with respect to the students, in one
    launch. After a projection ``students`` and ``teachers`` may be empty."""
    m = num_rows(grads[0], rows)
    layers = range(len(grads))
    if student_projs and student_projs[0].shape[0] > BLAS_RANK:
        for i in layers:
            backward_(
                grads[i], False, grad_losses[i], None, None, student_projs[i], saved[i], rows,
                teacher_rows, weights, kind,
            )  # fmt: skip
        return
    native().backward(
        [
            pack_layer(
                students[i] if students else grads[i],
                teachers[i] if teachers else grads[i],
                student_projs[i] if student_projs else None,
                grad=grads[i],
            )
            for i in layers
        ],
        pack_shared(m, rows, teacher_rows, weights, kind),
        grad_losses.data_ptr(),
        0,
        grad_losses.stride(0),
        False,
        saved.data_ptr(),
        saved.shape[1],
        False,
    )
