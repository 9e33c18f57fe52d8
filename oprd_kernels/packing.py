"""Tensors as the native code takes them: addresses, sizes and strides (csrc/arguments.h)."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}

_NO_ROWS = (0, 0, 1, 0, 0, 1)


def pack_rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """A (N, d) or (B, T, d) tensor."""
    strides, inner = x.stride(), max(x.shape[-2], 1)
    if len(strides) == 2:
        outer = inner * strides[0]  # as if it went on: one stride says where every row is
        return x.data_ptr(), DTYPE_CODES[x.dtype], inner, outer, strides[0], strides[1]
    return x.data_ptr(), DTYPE_CODES[x.dtype], inner, strides[0], strides[1], strides[2]


def address(x: Tensor | None) -> int:
    """Where a tensor's data is; 0 for None."""
    return 0 if x is None else x.data_ptr()


def pack_layer(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None = None,
    teacher_proj: Tensor | None = None,
    teacher_mean: Tensor | None = None,
    grad: Tensor | None = None,
    rank: int | None = None,
) -> tuple:
    """One layer. ``rank`` is given where the inputs are z_S and z_T."""
    if rank is None:
        rank = 0 if student_proj is None else student_proj.shape[0]
    return (
        pack_rows(student),
        pack_rows(teacher),
        student.shape[-1],
        teacher.shape[-1],
        rank,
        address(student_proj),
        address(teacher_proj),
        address(teacher_mean),
        _NO_ROWS if grad is None else pack_rows(grad),
    )


def pack_shared(
    m: int, rows: Tensor | None, teacher_rows: Tensor | None, weights: Tensor | None, kind: str
) -> tuple:
    """What all layers of a call have in common."""
    threads = torch.get_num_threads()
    return m, address(rows), address(teacher_rows), address(weights), KIND_CODES[kind], threads
