"""Validation of the public functions' arguments, and their conversion to the form of `LossCall`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from oprd_kernels.call import LossCall, num_rows
from oprd_kernels.native import need_no_check

KINDS = ("mse", "nmse", "cosine")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
PROJECTOR_DIMS = {"student_proj": 2, "teacher_proj": 2, "teacher_mean": 1}


def check_call(
    student: Tensor,
    teacher: Tensor,
    *,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
    reduction: str,
    denominator: float | Tensor | None,
) -> LossCall:
    """Check the arguments of `fused_rep_loss` and convert them to a `LossCall`.

    Raises:
        ValueError, TypeError, IndexError: If an argument is invalid. The message names the
            argument, its value and what is expected.
    """
    if denominator is not None or kind not in KINDS or reduction not in REDUCTIONS:
        _check_options(kind, reduction, denominator)
    if student_proj is not None or teacher_proj is not None or teacher_mean is not None:
        are_fine = 0
    else:
        are_fine = need_no_check((student,), (teacher,))
    if not are_fine:
        student, teacher, student_proj, teacher_proj, teacher_mean = _states(
            student, teacher, student_proj, teacher_proj, teacher_mean
        )
    if (
        are_fine < 2
        or rows is not None
        or teacher_rows is not None
        or weights is not None
        or denominator is not None
    ):
        rows, teacher_rows, weights, denominator = _shared(
            student, teacher, rows, teacher_rows, weights, denominator
        )
    return LossCall(
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
    )


def check_calls(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    student_projs: Sequence[Tensor] | None,
    teacher_projs: Sequence[Tensor] | None,
    teacher_means: Sequence[Tensor] | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    kind: str,
    reduction: str,
    denominator: float | Tensor | None,
) -> list[LossCall]:
    """Check the arguments of `fused_rep_losses` and convert them to one `LossCall` per layer.

    Shared arguments are checked once, the tensors of each layer separately.

    Raises:
        ValueError, TypeError, IndexError: As `check_call` does. ValueError is also raised for lists
            that do not match and for layers that differ in their rows or rank.
    """
    layers = len(students)
    if layers == 0:
        raise ValueError("students is empty: expected at least one layer")
    lists = {
        "teachers": teachers,
        "student_projs": student_projs,
        "teacher_projs": teacher_projs,
        "teacher_means": teacher_means,
    }
    for name, column in lists.items():
        if column is not None and len(column) != layers:
            raise ValueError(f"{name} has {len(column)} tensors for {layers} layers of students")
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' for several layers, got 'none'")
    _check_options(kind, reduction, denominator)
    nothing = (None,) * layers
    columns = (
        students,
        teachers,
        nothing if student_projs is None else student_projs,
        nothing if teacher_projs is None else teacher_projs,
        nothing if teacher_means is None else teacher_means,
    )
    are_plain = student_projs is None and teacher_projs is None and teacher_means is None
    if are_plain and need_no_check(students, teachers):
        shared = _shared(students[0], teachers[0], rows, teacher_rows, weights, denominator)
        options = (None, None, None, *shared, kind, reduction)
        pairs = zip(students, teachers, strict=True)
        return [LossCall(student, teacher, *options) for student, teacher in pairs]
    first, *others = zip(*columns, strict=True)
    checked = _states(*first)
    shared = _shared(*checked[:2], rows, teacher_rows, weights, denominator)
    calls = [LossCall(*checked, *shared, kind, reduction)]
    for states in others:
        checked = _states(*states)
        student, teacher = states[:2]
        if student.shape[:-1] != first[0].shape[:-1] or _rank(checked[2]) != _rank(first[2]):
            raise ValueError(
                f"layer {len(calls)} has student {tuple(student.shape)} and rank "
                f"{_rank(checked[2])}, layer 0 {tuple(first[0].shape)} and {_rank(first[2])}: rows "
                "and rank must be the same"
            )
        if teacher.shape[:-1] != first[1].shape[:-1] or student.device != first[0].device:
            _shared(*checked[:2], *shared)
        calls.append(LossCall(*checked, *shared, kind, reduction))
    return calls


def _rank(student_proj: Tensor | None) -> int | None:
    return None if student_proj is None else student_proj.shape[0]


def _check_options(kind: str, reduction: str, denominator: float | Tensor | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator requires reduction='mean', got reduction={reduction!r}")


def _states(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check the states and projectors of one layer and return them in the form of `LossCall`."""
    device = student.device if isinstance(student, Tensor) else None
    student_shape = _shape("student", student, device)
    teacher_shape = _shape("teacher", teacher, device)
    d_student, d_teacher = student_shape[-1], teacher_shape[-1]
    if student_proj is None:
        if teacher_proj is not None or teacher_mean is not None or d_student != d_teacher:
            _refuse_identity(d_student, d_teacher, teacher_proj, teacher_mean)
    else:
        double = student.dtype is torch.float64 or teacher.dtype is torch.float64
        projectors = {
            "student_proj": student_proj,
            "teacher_proj": teacher_proj,
            "teacher_mean": teacher_mean,
        }
        for name, x in projectors.items():
            if x is not None:
                _shape(name, x, device, PROJECTOR_DIMS[name])
                double = double or x.dtype is torch.float64
        _check_projection(d_student, d_teacher, student_proj, teacher_proj, teacher_mean)
        # Kernels take contiguous float32 projectors; they are small, so converting them is cheap.
        exact = torch.float64 if double else torch.float32
        student_proj = student_proj.to(exact).contiguous()  # autograd converts its gradient back
        if teacher_proj is not None:
            teacher_proj = teacher_proj.detach().to(exact).contiguous()
        if teacher_mean is not None:
            teacher_mean = teacher_mean.detach().to(exact).contiguous()
    if teacher is student:
        raise ValueError(
            "student and teacher are the same tensor: the loss is always 0, and so is its gradient"
        )
    # Kernels read memory directly. A lazily negated tensor (x.conj().imag) stores other values.
    if not torch.compiler.is_compiling():
        student = student.resolve_neg() if student.is_neg() else student
        teacher = teacher.resolve_neg() if teacher.is_neg() else teacher
    if teacher.requires_grad:  # otherwise saving it for backward would keep its graph alive
        teacher = teacher.detach()
    if len(student_shape) not in (2, 3):
        student = _as_rows(student)
    if len(teacher_shape) not in (2, 3):
        teacher = _as_rows(teacher)
    return student, teacher, student_proj, teacher_proj, teacher_mean


def _shared(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments that all layers share: row indices, weights and denominator."""
    m, m_teacher = num_rows(student, None), num_rows(teacher, None)
    if rows is not None:
        rows = _row_index("rows", rows, m, student.device)
        m = rows.shape[0]
    if teacher_rows is not None:
        teacher_rows = _row_index("teacher_rows", teacher_rows, m_teacher, student.device)
        m_teacher = teacher_rows.shape[0]
    if m != m_teacher:
        raise ValueError(
            f"student has {m} rows and teacher {m_teacher}, but rows are paired in order. Pass "
            "rows to select rows of the student, and teacher_rows to select rows of the teacher"
        )
    if weights is not None:
        weights = _weights(weights, m, student.device)
    if denominator is not None:
        denominator = _denominator(denominator, student.device)
    return rows, teacher_rows, weights, denominator


def _shape(
    name: str, x: Tensor, device: torch.device | None, dims: int | None = None
) -> Sequence[int]:
    """Check ``x`` and return its shape."""
    # The fast path for ordinary valid tensors. `_explain` does the full check.
    if type(x) in PLAIN_TENSORS and x.dtype in DTYPES and x.layout is torch.strided:
        shape = x.shape
        if (
            shape
            and shape[-1]
            and (dims is None or len(shape) == dims)
            and x.device == device
            and not x.is_meta
        ):
            return shape
    _explain(name, x, device, dims)
    return x.shape


def _explain(name: str, x: Tensor, device: torch.device | None, dims: int | None) -> None:
    """Raise if ``x`` is invalid; return if it is a usable tensor subclass."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: fused kernels work on this rank's rows. Pass {name}.to_local(), "
            f"or {name}.full_tensor() if it is sharded along the hidden dimension"
        )
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values. Materialise it first")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; use to_dense()")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, student on {device}: move them together")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(x.shape)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        hint = (
            " (a parameter that FSDP holds sharded is empty outside its module's forward: gather "
            "it first)"
            if x.numel() == 0
            else ""
        )
        raise ValueError(f"{name} needs a hidden dimension, got shape {tuple(x.shape)}{hint}")


def _refuse_identity(
    d_student: int, d_teacher: int, teacher_proj: Tensor | None, teacher_mean: Tensor | None
) -> None:
    """Raise the error for an invalid call without student_proj."""
    if teacher_proj is not None or teacher_mean is not None:
        raise ValueError(
            "teacher_proj and teacher_mean need student_proj: without it student and teacher are "
            "compared without a projection. To compare with a teacher projected to the student's "
            "width, project it yourself and pass the result as teacher"
        )
    raise ValueError(
        f"student is {d_student} wide and teacher {d_teacher}: pass student_proj (r, "
        f"{d_student}) and teacher_proj (r, {d_teacher}) to compare them in r dimensions"
    )


def _check_projection(
    d_student: int,
    d_teacher: int,
    student_proj: Tensor,
    teacher_proj: Tensor | None,
    teacher_mean: Tensor | None,
) -> None:
    rank, width = student_proj.shape
    if rank == 0:
        raise ValueError("student_proj has rank 0: expected shape (r, dS) with r >= 1")
    if width != d_student:
        raise ValueError(
            f"student_proj must be (r, {d_student}) for a student {d_student} wide, got "
            f"{tuple(student_proj.shape)}"
        )
    if teacher_proj is None:
        if teacher_mean is not None:
            raise ValueError(
                "teacher_mean is subtracted before the projection: pass it with teacher_proj, or "
                "centre the already projected teacher yourself"
            )
        if d_teacher != rank:
            raise ValueError(
                f"without teacher_proj the teacher must already be projected to r = {rank}, got "
                f"{d_teacher}: pass teacher_proj ({rank}, {d_teacher})"
            )
        return
    if tuple(teacher_proj.shape) != (rank, d_teacher):
        raise ValueError(
            f"teacher_proj must be ({rank}, {d_teacher}), as student_proj has rank {rank} and the "
            f"teacher is {d_teacher} wide, got {tuple(teacher_proj.shape)}"
        )
    if teacher_mean is not None and teacher_mean.shape[0] != d_teacher:
        raise ValueError(f"teacher_mean must be ({d_teacher},), got {tuple(teacher_mean.shape)}")


def _as_rows(x: Tensor) -> Tensor:
    """Reshape (..., d) to (N, d) or (B, T, d), as a view wherever the strides allow one."""
    if x.dim() == 1:
        return x[None]
    return x if x.dim() <= 3 else x.flatten(0, -3)


def _row_index(name: str, index: Tensor, num_rows: int, device: torch.device) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index)
        raise TypeError(f"{name} must be a 1-D int64 tensor of row numbers, got {got}")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}, student on {device}: move them together")
    # On a GPU the check waits for the device, so it runs only with OPRD_CHECK=1.
    may_read = index.is_cpu and not torch.compiler.is_compiling()
    if index.numel() and (may_read or os.environ.get("OPRD_CHECK") == "1"):
        check_row_values(name, index, num_rows, unique=name == "rows")
    return index.contiguous()


def check_row_values(name: str, index: Tensor, num_rows: int, unique: bool) -> None:
    """Raise if a row number is not in [0, num_rows), or if ``unique`` and a number is repeated."""
    low, high = torch.aminmax(index)
    if low < 0 or high >= num_rows:
        raise IndexError(
            f"{name} must lie in [0, {num_rows}), the rows of its tensor flattened, got "
            f"{int(low)}..{int(high)}"
        )
    if unique and index.numel() > 1:
        steps_up = (index[1:] > index[:-1]).all()
        if not steps_up and index.unique().numel() != index.numel():
            raise ValueError(
                f"{name} names a row twice: each row of the student may be selected at most once. "
                "For a repeated row, sum its weights or average its targets"
            )


def _weights(weights: Tensor, m: int, device: torch.device) -> Tensor:
    if not isinstance(weights, Tensor) or weights.is_complex():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a tensor of real numbers, got {got}")
    if weights.numel() != m:
        raise ValueError(
            f"weights must have one value per supervised row, {m}, got {tuple(weights.shape)}"
        )
    if weights.device != device:
        raise ValueError(f"weights is on {weights.device}, student on {device}")
    _refuse_grad("weights", weights)
    return weights.detach().reshape(-1).to(torch.float32).contiguous()


def _refuse_grad(name: str, x: Tensor) -> None:
    """Raise if ``x`` waits for a gradient that it will not get."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and the loss gives it none: pass {name}.detach(). To "
            "train weights, multiply the losses of reduction='none' by them"
        )


MAX_FLOAT, MIN_FLOAT = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def _denominator(denominator: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.is_complex():
            raise ValueError(
                "denominator must be a number or a 0-D tensor of a real number, got "
                f"{denominator.dtype} {tuple(denominator.shape)}"
            )
        _refuse_grad("denominator", denominator)
        # Reading it from a GPU would wait for the device.
        may_read = denominator.is_cpu and not torch.compiler.is_compiling()
        if may_read or os.environ.get("OPRD_CHECK") == "1":
            _check_denominator(denominator.item())
        return denominator.detach().reshape(()).to(device, torch.float32)
    if not isinstance(denominator, Real):
        raise TypeError(f"denominator must be a number or a 0-D tensor, got {type(denominator)}")
    value = float(denominator)
    _check_denominator(value)
    return torch.full((), value, dtype=torch.float32, device=device)


def _check_denominator(value: float) -> None:
    if value != 0 and not MIN_FLOAT <= value <= MAX_FLOAT:  # NaN is refused too
        raise ValueError(
            f"denominator must be 0 (loss and gradient are then 0) or a positive float32, got "
            f"{value}. It is a count of tokens, or a sum of weights; to change the loss's sign or "
            "size, multiply the loss"
        )
