"""From a call to launches of the Triton kernels.

What the launches of a call are follows from its options and the forms of its tensors (`Form`):
functions named ``.._launches`` say so, and are asked once for each of the calls last seen. A call
then only gathers its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall, num_rows
from oprd_kernels.triton_backend import configs
from oprd_kernels.triton_backend.geometry import Form, form, geometry
from oprd_kernels.triton_backend.identity import identity_backward, identity_forward
from oprd_kernels.triton_backend.identity_wide import identity_forward_wide
from oprd_kernels.triton_backend.launch import Kernel, Launch
from oprd_kernels.triton_backend.operands import (
    PRODUCTS,
    RANK_BLOCK,
    Plan,
    next_power_of_2,
    plan,
    prepare,
)
from oprd_kernels.triton_backend.projected import BOTH, compare, project, projected_forward
from oprd_kernels.triton_backend.projected_gradients import (
    half_backward,
    projector_gradient,
    tiled_backward,
)
from oprd_kernels.triton_backend.reduction import reduce_rows
from oprd_kernels.triton_backend.saved import ALIGN, HEAD, SUMS, TICKET, aligned

KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = triton.knobs.runtime.interpret
MAX_LAYERS = 32
"""Layers in one launch: their addresses are parameters of the kernel."""
MAX_CHUNKS = 64
"""Programs that the reduction of rows compared as they are takes."""
CHUNK = 1024
"""Rows that they sum at a time."""
KEPT = 512
"""Calls of other shapes whose launches are remembered."""

Launches = TypeVar("Launches")

IDENTITY_FORWARD, IDENTITY_BACKWARD = Kernel(identity_forward), Kernel(identity_backward)
IDENTITY_FORWARD_WIDE, REDUCE_ROWS = Kernel(identity_forward_wide), Kernel(reduce_rows)
PREPARE, PROJECTED_FORWARD = Kernel(prepare), Kernel(projected_forward)
PROJECT, COMPARE = Kernel(project), Kernel(compare)
HALF_BACKWARD, TILED_BACKWARD = Kernel(half_backward), Kernel(tiled_backward)
PROJECTOR_GRADIENT = Kernel(projector_gradient)


@functools.cache
def _generation(index: int) -> str:
    """The row of `configs` that fits a device best: consumer Blackwell (sm_120) has the shared
    memory and the tensor-core instructions of the generation before Hopper."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def generation(device: torch.device) -> str:
    """The device generation whose configurations are used."""
    return "sm90" if device.type == "cpu" else _generation(device.index or 0)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than the Ampere generation (sm_80)"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units): as many programs keep the device busy."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def new_floats(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    """float32 memory, not yet written. What lies between the parts of ``saved`` never is."""
    return _no_floats(device).new_empty(shape)


@functools.cache
def _no_floats(device: torch.device) -> Tensor:
    """From which `new_floats` makes others: a third faster than reading a dtype and a device."""
    return torch.empty(0, dtype=torch.float32, device=device)


def kept(build: Callable[..., Launches]) -> Callable[..., Launches]:
    """Remembers what launches ``build`` made of its arguments; not in the interpreter, where tests
    change block sizes."""
    return build if INTERPRETED else functools.lru_cache(KEPT)(build)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def float32_precision(*dtypes: torch.dtype) -> str:
    """The precision that the user has set for products of float32 matrices, if any of ``dtypes``
    is that."""
    if torch.float32 not in dtypes:
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer name, which the older refuses to tell
        newer = torch.backends.cuda.matmul.fp32_precision
        return {"tf32": "high", "bf16": "medium"}.get(newer, "highest")


def half_float_products(dtype: torch.dtype, precision: str) -> int:
    """Products of terms for states, or gradients, that are not bfloat16."""
    return PRODUCTS[precision] if dtype is torch.float32 else 3


class TritonBackend:
    """`oprd_kernels.protocol.Backend` by the kernels of this package."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """Why no kernel of this backend can run on tensors of ``device``; None if it can."""
        if INTERPRETED:
            if device.type == "cpu":
                return None
            return f"TRITON_INTERPRET=1 is set, which takes tensors on the CPU, not on {device}"
        if device.type != "cuda":
            return f"the triton backend takes tensors on a GPU, not on {device}"
        return _too_old(device)

    def unsupported(self, call: LossCall) -> str | None:
        """None: this backend does every call."""
        return None

    def saved_size(self, call: LossCall) -> int:
        """Floats in ``saved``, see `saved` and `operands.Plan`."""
        m = call.num_rows
        if call.student_proj is None:
            return HEAD.value + 4 * aligned(m) + MAX_CHUNKS * SUMS.value
        return _saved_plan(call.student, call.student_proj).saved_size(m)

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Backend.forward`."""
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
        """As `Backend.backward_`."""
        m = num_rows(grad, call.rows)
        if not m:
            return
        if call.student_proj is None:
            row_stride = grad_loss.stride(0) if grad_loss.dim() else 0
            _identity_backward((call,), m, (grad,), accumulate, grad_loss, row_stride, 0)
        else:
            _projected_backward(call, m, grad, accumulate, grad_loss)

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """As `Backend.grad_proj`."""
        return _projector_gradient(call, grad_loss)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """As `Backend.forward_layers`: in one launch where rows are compared as they are."""
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
        """As `Backend.backward_layers_`."""
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
    """Ranges of calls whose states have the same dtypes and strides: one launch each."""
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


def _row_config(arch: str, width: int, *forms: Form | None) -> configs.RowConfig | None:
    return configs.row(arch, width, max([x[2].itemsize for x in forms if x is not None]))


class _Identity(NamedTuple):
    """Forward of rows compared as they are."""

    scale: Launch  # sums the weights
    forward: Launch
    reduce: Launch


@kept
def _identity_launches(
    kind: str, reduction: str, layers: int, m: int, size: int, arch: str,
    student: Form, teacher: Form, grad: Form | None,
) -> _Identity:  # fmt: skip
    width = student[0][-1]
    mean, each = reduction == "mean", reduction == "none"
    chunks = min(cdiv(m, CHUNK), MAX_CHUNKS) or 1
    chunk = cdiv(cdiv(m, chunks), CHUNK) * CHUNK
    scale, reduce = (
        Launch(
            REDUCE_ROWS,
            (cdiv(m, chunk) if m else 1, layers, 1),
            (size, m, chunk),
            (mean, each, CHUNK, MAX_CHUNKS, scale_only),
            4,
        )
        for scale_only in (True, False)
    )
    where = geometry(student, teacher, grad)
    config = _row_config(arch, width, student, teacher, grad)
    kernel = IDENTITY_FORWARD
    if config is None:
        config, kernel = configs.wide_row(arch), IDENTITY_FORWARD_WIDE
    forward = Launch(
        kernel,
        (m, layers, 1),
        (size, m, *where.strides),
        (
            KIND_CODES[kind], mean, each, width, config.columns, config.pieces,
            where.unit, where.flat, where.dense,
        ),
        config.warps,
    )  # fmt: skip
    return _Identity(scale, forward, reduce)


def _identity(
    calls: Sequence[LossCall], m: int, loss: Tensor, saved: Tensor, size: int, grad: Tensor | None
) -> None:
    """Forward of rows compared as they are. ``size``: floats from layer to layer in ``saved``."""
    student, teacher, _, _, _, rows, teacher_rows, weights, denominator, kind, reduction = calls[0]
    device = student.device
    scale, forward, reduce = _identity_launches(
        kind, reduction, len(calls), m, size, generation(device), form(student), form(teacher),
        None if grad is None else form(grad),
    )  # fmt: skip
    sums = loss, saved, weights, denominator
    if m:
        if grad is not None and reduction == "mean" and denominator is None and weights is not None:
            saved[TICKET.value].zero_()
            scale(device, sums)  # the gradient is formed before all rows have been summed
        students = tuple([call.student for call in calls])
        teachers = tuple([call.teacher for call in calls])
        forward(device, (students, teachers, grad, *sums[:2], rows, teacher_rows, *sums[2:]))
    reduce(device, sums)


@kept
def _identity_backward_launch(
    kind: str, layers: int, m: int, accumulate: bool, row_stride: int, layer_stride: int, arch: str,
    student: Form, teacher: Form, grad: Form,
) -> Launch:  # fmt: skip
    width = grad[0][-1]
    where = geometry(student, teacher, grad)
    config = _row_config(arch, width, student, teacher, grad)
    parts = 1
    if config is None or (accumulate and config.warps == 1 and config.pieces > 4):
        # Three tensors: half the pieces.
        warps = 4 if config is None else 1
        itemsize = max(student[2].itemsize, teacher[2].itemsize, grad[2].itemsize)
        columns = configs.piece(arch, itemsize, warps)
        config = configs.RowConfig(columns, 4, warps)
        parts = cdiv(width, columns * 4)
    return Launch(
        IDENTITY_BACKWARD,
        (m, layers, parts),
        (row_stride, layer_stride, m, *where.strides),
        (
            KIND_CODES[kind], accumulate, width, config.columns, config.pieces, where.unit,
            where.flat, where.dense,
        ),
        config.warps,
    )  # fmt: skip


def _identity_backward(
    calls: Sequence[GradCall], m: int, grads: tuple[Tensor, ...], accumulate: bool,
    grad_loss: Tensor, row_stride: int, layer_stride: int,
) -> None:  # fmt: skip
    """Backward of rows compared as they are."""
    _, student, teacher, _, rows, teacher_rows, weights, kind, _ = calls[0]
    assert student is not None
    assert teacher is not None
    grad = grads[0]
    device = grad.device
    launch = _identity_backward_launch(
        kind, len(calls), m, accumulate, row_stride, layer_stride, generation(device),
        form(student), form(teacher), form(grad),
    )  # fmt: skip
    students = tuple([call.student for call in calls])
    teachers = tuple([call.teacher for call in calls])
    saved = tuple([call.saved for call in calls])
    states: Any = (students, teachers)  # after a projection alone could they be None
    launch(device, (grads, *states, saved, grad_loss, rows, teacher_rows, weights))


def _saved_plan(student: Tensor, proj: Tensor) -> Plan:
    """The plan of ``saved``, which does not depend on the teacher."""
    rank, width = proj.shape  # plain numbers, also while a compiler traces shapes
    return plan(int(rank), int(width), 0, student.dtype, student.dtype)


class _Projection(NamedTuple):
    """Forward after a projection."""

    work_size: int
    prepare: Launch
    projects: list[Launch]
    compare: Launch | None  # None: what projects has compared too


@kept
def _project_launches(
    kind: str, reduction: str, m: int, rank: int, projects_teacher: bool, precision: str, arch: str,
    wanted: int, student: Form, teacher: Form,
) -> _Projection:  # fmt: skip
    width, dtype, teacher_dtype = student[0][-1], student[2], teacher[2]
    teacher_width = teacher[0][-1] if projects_teacher else 0
    layout = plan(rank, width, teacher_width, dtype, teacher_dtype)
    k = layout.k
    has_float = dtype is torch.float32 or (projects_teacher and teacher_dtype is torch.float32)
    products = PRODUCTS[precision]
    block = min(layout.forward_k, RANK_BLOCK)
    config = configs.projection(arch, block, has_float)
    blocks = cdiv(m, config.rows)
    few = 2 * blocks < wanted
    fused = configs.fuses(k, has_float) and not few
    sizes = (width, layout.student_columns, teacher_width, layout.teacher_columns)
    terms = (layout.student_terms, layout.teacher_terms)
    prepare = Launch(
        PREPARE,
        (k, 1 + projects_teacher, 1),
        (rank,),
        (TYPES[dtype], TYPES[teacher_dtype], k, *sizes, layout.operand, *terms, 1024),
        4,
    )
    where = geometry(student, teacher)
    flags = (where.unit, where.flat, where.dense)
    options = (KIND_CODES[kind], reduction == "mean", reduction == "none", rank)
    if fused:
        forward = Launch(
            PROJECTED_FORWARD,
            (blocks, 1, 1),
            (m, *where.strides),
            (
                *options, config.rows, config.columns, block, k, layout.dz_k, projects_teacher,
                layout.half_dz, products, *flags, *sizes, layout.scales, *terms, layout.rest, 512,
            ),
            config.warps,
            config.stages,
        )  # fmt: skip
        return _Projection(layout.rest + blocks * SUMS.value, prepare, [forward], None)
    config = configs.project(arch, block, has_float, few)
    comparison = configs.comparison(arch, next_power_of_2(layout.forward_k))
    row_blocks, rank_blocks = cdiv(m, config.rows), layout.forward_k // block
    blocks, z_rows = row_blocks * rank_blocks, row_blocks * config.rows
    parts = max(min(2 * wanted // (blocks * (1 + projects_teacher)), 8), 1)
    programs = cdiv(m, comparison.rows)
    z_at = layout.rest + aligned(programs * SUMS.value)
    part = [cdiv(cdiv(n, config.columns), parts) for n in (width, teacher_width)]
    sides = [0, 1] if projects_teacher else [0]
    if projects_teacher and dtype is teacher_dtype:
        sides = [BOTH.value]
    projects = [
        Launch(
            PROJECT,
            (blocks, parts, 2 if side == BOTH.value else 1),
            (m, *where.strides, *part, z_at // ALIGN.value, z_rows),
            (
                config.rows, config.columns, block, rank_blocks, k, products, *flags, *sizes,
                *terms, side,
            ),
            config.warps,
            config.stages,
        )
        for side in sides
    ]  # fmt: skip
    compare = Launch(
        COMPARE,
        (programs, 1, 1),
        (z_at // ALIGN.value, z_rows, parts, m, *where.strides[4:]),
        (
            *options, comparison.rows, layout.forward_k, layout.dz_k, k, comparison.ranks,
            projects_teacher, layout.half_dz, where.unit, where.flat, layout.scales, layout.rest,
            512,
        ),
        comparison.warps,
    )  # fmt: skip
    work_size = z_at + (1 + projects_teacher) * parts * z_rows * layout.forward_k
    return _Projection(work_size, prepare, projects, compare)


def _project(call: LossCall, m: int, loss: Tensor, saved: Tensor) -> None:
    """Forward after a projection."""
    student, teacher, proj, teacher_proj, mean, rows, teacher_rows, weights = call[:8]
    assert proj is not None
    device = student.device
    work_size, prepare, projects, compare = _project_launches(
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


@kept
def _projected_backward_launch(
    m: int, rank: int, accumulate: bool, row_stride: int, precision: str, arch: str, wanted: int,
    grad: Form,
) -> Launch:  # fmt: skip
    width, dtype = grad[0][-1], grad[2]
    layout = plan(rank, width, 0, dtype, dtype)
    k = layout.k
    where = geometry(grad)
    places = (width, layout.student_columns, layout.operand, layout.scales)
    flags = (where.unit, where.flat, where.dense)
    if layout.half_dz and k in configs.RESIDENT_RANKS:
        config = configs.half_backward(arch, k, accumulate)
        blocks = cdiv(m, config.rows)
        parts = cdiv(4 * wanted, blocks)
        columns = cdiv(width, config.columns)
        part = cdiv(columns, parts)
        return Launch(
            HALF_BACKWARD,
            (blocks, cdiv(columns, part), 1),
            (row_stride, m, *where.strides, part),
            (accumulate, config.rows, config.columns, k, layout.dz_k, *places, *flags),
            config.warps,
            config.stages,
        )
    config = configs.tiled_backward(arch, k)
    return Launch(
        TILED_BACKWARD,
        (cdiv(width, config.columns) * cdiv(m, config.rows), 1, 1),
        (row_stride, m, *where.strides),
        (
            accumulate, config.rows, config.columns, config.ranks, k, layout.dz_k,
            next_power_of_2(k), half_float_products(dtype, precision), layout.half_dz, *places,
            *flags,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip


def _projected_backward(
    call: GradCall, m: int, grad: Tensor, accumulate: bool, grad_loss: Tensor
) -> None:
    """The gradient of the student after a projection."""
    assert call.student_proj is not None
    device = grad.device
    launch = _projected_backward_launch(
        m, call.student_proj.shape[0], accumulate, grad_loss.stride(0) if grad_loss.dim() else 0,
        float32_precision(grad.dtype), generation(device), processors(device), form(grad),
    )  # fmt: skip
    launch(device, (grad, call.saved, grad_loss, call.rows, call.weights))


class _ProjectorGradient(NamedTuple):
    """The gradient of the student's projector."""

    shape: tuple[int, int, int]  # of the partial sums
    launch: Launch


@kept
def _projector_gradient_launches(
    m: int, rank: int, row_stride: int, precision: str, arch: str, wanted: int, student: Form
) -> _ProjectorGradient:
    width, dtype = student[0][-1], student[2]
    layout = plan(rank, width, 0, dtype, dtype)
    k = layout.k
    config = configs.projector_gradient(arch, k)
    tiles = cdiv(width, config.columns), k // config.ranks
    parts = max(min(2 * wanted // (tiles[0] * tiles[1]), cdiv(m, 4 * config.rows)), 1)
    chunk = cdiv(cdiv(m, parts), config.rows) * config.rows
    parts = cdiv(m, chunk)
    where = geometry(student)
    launch = Launch(
        PROJECTOR_GRADIENT,
        (*tiles, parts),
        (row_stride, m, *where.strides, chunk),
        (
            config.rows, config.columns, config.ranks, k, layout.dz_k,
            half_float_products(dtype, precision),
            layout.half_dz, width, layout.student_columns, layout.scales, where.unit, where.flat,
            where.dense,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip
    return _ProjectorGradient((parts, k, layout.student_columns), launch)


def _projector_gradient(call: GradCall, grad_loss: Tensor) -> Tensor:
    """The gradient of the student's projector."""
    student, proj = call.student, call.student_proj
    assert student is not None
    assert proj is not None
    m, device = num_rows(student, call.rows), student.device
    if not m:
        return torch.zeros_like(proj, memory_format=torch.contiguous_format)
    rank, width = proj.shape
    shape, launch = _projector_gradient_launches(
        m, rank, grad_loss.stride(0) if grad_loss.dim() else 0,
        float32_precision(student.dtype), generation(device), processors(device),
        form(student),
    )  # fmt: skip
    partial = new_floats(shape, device)
    launch(device, (partial, student, call.saved, grad_loss, call.rows, call.weights))
    return partial.sum(0)[:rank, :width].to(proj.dtype).contiguous()
