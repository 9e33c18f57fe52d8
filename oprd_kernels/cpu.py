"""Launches the native CPU kernels on tensors that `oprd_kernels.validate` has accepted.

One float32 buffer, ``saved``, carries everything from forward to backward:
batch statistics (STATS) | row statistics (M, 3) | row losses (M), unless they are the result
themselves | dz (M, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oprd_kernels.backends import native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
STATS = 5
"""Floats at the start of ``saved``: mean cosine, mean student norm, mean teacher norm, number of
rows whose weight is not 0, the factor the reduction puts on every row."""
SCALE = 4


BLAS_RANK = 32
"""Above this rank the products with the projectors are BLAS's, on slices of rows."""
SLICE = 1024
"""Rows in a slice: their float32 copies and products stay in the last-level cache."""

_NO_ROWS = (0, 0, 1, 0, 0, 1)


def num_rows(student: Tensor, rows: Tensor | None) -> int:
    """M: how many rows of student are compared."""
    return student.shape[:-1].numel() if rows is None else rows.shape[0]


def saved_size(m: int, rank: int, reduction: str) -> int:
    """Floats in ``saved`` for one layer."""
    return STATS + (rank + (3 if reduction == "none" else 4)) * m


def dz_of(saved: Tensor, m: int, rank: int) -> Tensor:
    """The (M, r) part of one layer's ``saved``."""
    return saved[saved.shape[0] - m * rank :].view(m, rank)


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """A (N, d) or (B, T, d) tensor as the native code addresses it."""
    strides, inner = x.stride(), max(x.shape[-2], 1)
    if len(strides) == 2:
        return x.data_ptr(), DTYPE_CODES[x.dtype], inner, 0, strides[0], strides[1]
    return x.data_ptr(), DTYPE_CODES[x.dtype], inner, strides[0], strides[1], strides[2]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _layer(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None = None,
    teacher_proj: Tensor | None = None,
    teacher_mean: Tensor | None = None,
    grad: Tensor | None = None,
    rank: int | None = None,
) -> tuple:
    """A layer as the native code takes it. ``rank`` is given where the inputs are z_S and z_T."""
    if rank is None:
        rank = 0 if student_proj is None else student_proj.shape[0]
    return (
        _rows(student),
        _rows(teacher),
        student.shape[-1],
        teacher.shape[-1],
        rank,
        _address(student_proj),
        _address(teacher_proj),
        _address(teacher_mean),
        _NO_ROWS if grad is None else _rows(grad),
    )


def _shared(
    m: int, rows: Tensor | None, teacher_rows: Tensor | None, weights: Tensor | None, kind: str
) -> tuple:
    """What all layers of a call have in common, as the native code takes it."""
    threads = torch.get_num_threads()
    return m, _address(rows), _address(teacher_rows), _address(weights), KIND_CODES[kind], threads


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
    options: dict[str, Any] = {} if student.dtype is torch.float32 else {"dtype": torch.float32}
    loss = student.new_empty((m,) if each else (), **options)
    saved = student.new_empty(saved_size(m, rank, reduction), **options)
    shared = _shared(m, rows, teacher_rows, weights, kind)
    if rank > BLAS_RANK:
        _forward_slices(
            loss, saved, m, each, student, teacher, student_proj, teacher_proj, teacher_mean,
            rows, teacher_rows, weights, kind,
        )  # fmt: skip
        reduced = (_address(denominator), reduction == "mean", each)
        native().reduce(shared, *reduced, loss.data_ptr(), saved.data_ptr())
        return loss, saved
    native().forward(
        [_layer(student, teacher, student_proj, teacher_proj, teacher_mean, grad)],
        shared,
        _address(denominator),
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
            _rows(self.x),
            _address(self.index),
            at.start,
            count,
            self.x.shape[-1],
            _address(self.mean),
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
        shared = _shared(count, None, None, None if weights is None else weights[at], kind)
        layer = _layer(z_s[:count], targets, rank=rank)
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
    shared = _shared(m, rows, teacher_rows, weights, kind)
    layer = _layer(student, teacher, student_proj, grad=grad)
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


def coefficients(
    grad_loss: Tensor, saved: Tensor, weights: Tensor | None, at: slice = slice(None)
) -> Tensor:
    """(M,) or (): what the chain rule multiplies each row's dz by."""
    value = grad_loss[at] if grad_loss.dim() else grad_loss
    value = value * saved[SCALE]
    return value if weights is None else value * weights[at]


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
        [_layer(students[i], teachers[i], *options[i]) for i in range(layers)],
        _shared(m, rows, teacher_rows, weights, kind),
        _address(denominator),
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
            _layer(
                students[i] if students else grads[i],
                teachers[i] if teachers else grads[i],
                student_projs[i] if student_projs else None,
                grad=grads[i],
            )
            for i in layers
        ],
        _shared(m, rows, teacher_rows, weights, kind),
        grad_losses.data_ptr(),
        0,
        grad_losses.stride(0),
        False,
        saved.data_ptr(),
        saved.shape[1],
        False,
    )
