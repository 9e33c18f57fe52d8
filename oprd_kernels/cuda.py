"""Launches the CUDA C++ kernels on tensors that `oprd_kernels.validate` has accepted.

They run on the current stream of the tensors' device, allocate nothing and never wait for the
device: a call may be captured in a CUDA graph. What they do not do (`unsupported`: dtypes in a mix,
a last stride other than 1, a rank above 16) the Triton backend does.

For tests the same kernels run without a GPU: with the environment variable OPRD_CUDA_EMULATION set
to the path of the module ``_emulated`` (CMake option of the same name; see csrc/cuda/emulation),
the launchers take tensors on the CPU and every access is checked: a data race, an access outside
the tensors passed, a read of what nobody wrote raise RuntimeError. OPRD_CUDA_EMULATION_SEED chooses
the order in which emulated threads run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oprd_kernels import backends
from oprd_kernels.layout import new_outputs, num_rows, saved_size
from oprd_kernels.packing import DTYPE_CODES, address, pack_layer, pack_shared

if TYPE_CHECKING:
    from oprd_kernels.validate import Inputs

MAX_RANK = 16
"""Larger products are for tensor cores, which the Triton kernels use."""

Memory = tuple[str, str, Tensor | None]
"""What a launch may touch: the kind it is counted as, "r", "w" or "rw", and the tensor."""


@functools.cache
def emulation() -> ModuleType | None:
    """The emulation that OPRD_CUDA_EMULATION names, or None: there is to be a GPU."""
    path = os.environ.get("OPRD_CUDA_EMULATION")
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"OPRD_CUDA_EMULATION={path} is not a Python extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this backend can run on tensors of ``device``; None if it can."""
    if device.type == "cpu" and emulation() is not None:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the cuda backend takes tensors on an NVIDIA GPU, not on {device}"
    return installation_problem() or _capability_problem(device)


@functools.cache
def installation_problem() -> str | None:
    """Why the CUDA kernels can't be used on this machine at all; None if they can."""
    if reason := backends.native_problem():
        return reason
    module = backends.native()
    if not hasattr(module, "cuda_forward"):
        return (
            f"the CUDA kernels are not installed ({backends.cuda_build_problem()}). Install the "
            "CUDA toolkit, so that nvcc is on PATH, and reinstall oprd with pip"
        )
    runtime, driver, problem = module.cuda_facts()
    if not problem:
        return None
    versions = f"built with CUDA {version_name(runtime)}, driver for {version_name(driver)}"
    return f"{problem} ({versions})"


def version_name(number: int) -> str:
    """CUDA's 12080 as "12.8"; 0 is what a machine without a driver has."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    oldest = int(backends.native().cuda_architectures.split(",")[0])
    if major * 10 + minor >= oldest:
        return None
    return (
        f"{device} has compute capability {major}.{minor}, the CUDA kernels are built for "
        f"{oldest // 10}.{oldest % 10} and later"
    )


def unsupported(inputs: Inputs) -> str | None:
    """Why this backend can't do a call that others can; None if it can."""
    student, teacher, proj = inputs.student, inputs.teacher, inputs.student_proj
    if student.dtype is not teacher.dtype:
        return f"student is {student.dtype} and teacher {teacher.dtype}: it takes one dtype a call"
    for name, x in (("student", student), ("teacher", teacher)):
        if not _has_dense_rows(x):
            return f"{name} has strides {x.stride()}: it takes rows whose last stride is 1"
    if proj is not None and proj.shape[0] > MAX_RANK:
        return f"the rank is {proj.shape[0]}: it projects to {MAX_RANK} dimensions at most"
    return None


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _launch(
    name: str, arguments: tuple, device: torch.device, memory: Callable[[], list[Memory]]
) -> None:
    if device.type == "cpu":
        emulated: Any = emulation()
        emulated.allow(
            [
                (kind, mode, x.data_ptr(), x.element_size(), x.shape, x.stride())
                for kind, mode, x in memory()
                if x is not None
            ]
        )
        getattr(emulated, name)(*arguments, 0, 0)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(backends.native(), name)(*arguments, device.index, stream)


def _scratch(like: Tensor, m: int, columns: Sequence[tuple]) -> Tensor | None:
    """Where a reduction over many rows puts its parts' sums, and projectors their terms."""
    module: Any = emulation() if like.is_cpu else backends.native()
    student, _, proj, *_ = columns[0]
    rank = 0 if proj is None else proj.shape[0]
    widths = [max(x[i].shape[-1] for x in columns) for i in (0, 1)]
    if columns[0][3] is None:
        widths[1] = 0
    code = DTYPE_CODES[student.dtype]
    size = module.cuda_scratch(m, len(columns), rank, *widths, code)
    return like.new_empty(size, dtype=torch.float64) if size else None


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
    """Loss and ``saved`` (see `layout`).

    ``grad``, if given, receives the gradient of the reduced loss with respect to ``student``;
    it may be ``teacher`` itself.

    Raises:
        RuntimeError: a launch failed; names the kernel, the shape and what CUDA says.
    """
    m = num_rows(student, rows)
    rank = 0 if student_proj is None else student_proj.shape[0]
    loss, saved = new_outputs(student, m, rank, reduction)
    layer = pack_layer(student, teacher, student_proj, teacher_proj, teacher_mean, grad)
    columns = [(student, teacher, student_proj, teacher_proj, teacher_mean)]
    shared = (rows, teacher_rows, weights, denominator, kind, reduction)
    _forward([layer], columns, m, loss, saved, saved.shape[0], *shared, grad=grad)
    return loss, saved


def _forward(
    layers, columns, m, loss, saved, saved_per_layer, rows, teacher_rows, weights, denominator,
    kind, reduction, grad=None,
) -> None:  # fmt: skip
    scratch = _scratch(saved, m, columns)

    def memory() -> list[Memory]:
        bits = None if scratch is None else scratch.view(torch.int16)
        found: list[Memory] = [("rows", "w", x) for x in (saved, loss, bits)]
        found += [("rows", "r", x) for x in (rows, teacher_rows, weights, denominator)]
        for student, teacher, *projectors in columns:
            found.append(("activations", "r", student))
            found.append(("activations", "rw" if grad is teacher else "r", teacher))
            found += [("projectors", "r", x) for x in projectors]
        if grad is not None and grad is not columns[0][1]:
            found.append(("activations", "w", grad))
        return found

    arguments = (
        layers,
        pack_shared(m, rows, teacher_rows, weights, kind),
        address(denominator),
        reduction == "mean",
        reduction == "none",
        loss.data_ptr(),
        saved.data_ptr(),
        saved_per_layer,
        address(scratch),
    )
    _launch("cuda_forward", arguments, saved.device, memory)


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

    ``grad`` has the student's shape and dtype; other rows are not touched. ``grad_loss`` is a
    float32 scalar, or (M,) for reduction "none". After a projection the gradient follows from dz
    alone: student and teacher may be None.

    Raises: as `forward`.
    """
    if not _has_dense_rows(grad):  # what flows through a tap has whatever strides it comes with
        dense = grad.contiguous()
        backward_(dense, accumulate, grad_loss, student, teacher, student_proj, saved, rows,
                  teacher_rows, weights, kind)  # fmt: skip
        grad.copy_(dense)
        return
    each = grad_loss.dim() > 0
    row_stride = grad_loss.stride(0) if each else 0
    _backward(
        [grad], [student], [teacher], [student_proj], grad_loss, row_stride, 0, each, saved,
        saved.shape[0], accumulate, rows, teacher_rows, weights, kind,
    )  # fmt: skip


def _backward(
    grads, students, teachers, projs, grad_loss, row_stride, layer_stride, each, saved,
    saved_per_layer, accumulate, rows, teacher_rows, weights, kind,
) -> None:  # fmt: skip
    m = num_rows(grads[0], rows)

    def memory() -> list[Memory]:
        found: list[Memory] = [
            ("rows", "r", x) for x in (rows, teacher_rows, weights, grad_loss, saved)
        ]
        found += [("activations", "rw" if accumulate else "w", grad) for grad in grads]
        found += [("activations", "r", x) for x in (*students, *teachers)]
        found += [("projectors", "r", x) for x in projs]
        return found

    layers = []
    for grad, student, teacher, proj in zip(grads, students, teachers, projs, strict=True):
        student = grad if student is None else student
        layers.append(pack_layer(student, student if teacher is None else teacher, proj, grad=grad))
    arguments = (
        layers,
        pack_shared(m, rows, teacher_rows, weights, kind),
        grad_loss.data_ptr(),
        row_stride,
        layer_stride,
        each,
        saved.data_ptr(),
        saved_per_layer,
        accumulate,
    )
    _launch("cuda_backward", arguments, saved.device, memory)


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
    """(L,) losses and (L, saved_size), launch after launch; empty sequences for what is not used.

    Raises: as `forward`.
    """
    m, layers = num_rows(students[0], rows), len(students)
    rank = student_projs[0].shape[0] if student_projs else 0
    losses = students[0].new_empty(layers, dtype=torch.float32)
    saved = students[0].new_empty(layers, saved_size(m, rank, reduction), dtype=torch.float32)
    none = [None] * layers
    lists: list[Sequence[Any]] = [students, teachers]
    lists += [column or none for column in (student_projs, teacher_projs, teacher_means)]
    columns = list(zip(*lists, strict=True))
    packed = [pack_layer(*column) for column in columns]
    shared = (rows, teacher_rows, weights, denominator, kind, reduction)
    _forward(packed, columns, m, losses, saved, saved.shape[1], *shared)
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
    """Writes the gradients of sum_l grad_losses[l] * loss[l] with respect to the students. After a
    projection ``students`` and ``teachers`` may be empty.

    Raises: as `forward`.
    """
    none = [None] * len(grads)
    _backward(
        grads, students or none, teachers or none, student_projs or none, grad_losses, 0,
        grad_losses.stride(0), False, saved, saved.shape[1], False, rows, teacher_rows, weights,
        kind,
    )  # fmt: skip
