"""From a call to launches of the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall, num_rows
from oprd_kernels.triton_backend import configs
from oprd_kernels.triton_backend.geometry import geometry
from oprd_kernels.triton_backend.identity import identity_backward, identity_forward
from oprd_kernels.triton_backend.identity_wide import identity_forward_wide
from oprd_kernels.triton_backend.launch import Kernel
from oprd_kernels.triton_backend.operands import (
    PRODUCTS,
    RANK_BLOCK,
    Plan,
    next_power_of_2,
    plan,
    prepare,
)
from oprd_kernels.triton_backend.projected import compare, project, projected_forward
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
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units): as many programs keep the device busy."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def new_floats(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 memory, not yet written. What lies between the parts of ``saved`` never is."""
    return torch.empty(shape, dtype=torch.float32, device=device)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def half_float_products(dtype: torch.dtype) -> int:
    """Products of terms for states, or gradients, that are not bfloat16."""
    return PRODUCTS[torch.get_float32_matmul_precision()] if dtype is torch.float32 else 3


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
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            return f"{name} is older than the Ampere generation (sm_80)"
        return None

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
        shape = (m,) if call.reduction == "none" else ()
        loss = new_floats(shape, student.device)
        size = self.saved_size(call)
        saved = new_floats((size,), student.device)
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
        losses = new_floats((len(calls),), device)
        size = aligned(max([self.saved_size(call) for call in calls]))
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
        student, teacher = call.student, call.teacher
        assert student is not None
        assert teacher is not None
        this = (
            student.dtype, student.shape, student.stride(),
            teacher.dtype, teacher.shape, teacher.stride(),
        )  # fmt: skip
        if n and (this != kind or n - begin == MAX_LAYERS):
            ranges.append((begin, n))
            begin = n
        kind = this
    ranges.append((begin, len(calls)))
    return ranges


def _row_config(
    device: torch.device, width: int, *tensors: Tensor | None
) -> configs.RowConfig | None:
    itemsize = max(x.element_size() for x in tensors if x is not None)
    return configs.row(generation(device), width, itemsize)


def _identity(
    calls: Sequence[LossCall], m: int, loss: Tensor, saved: Tensor, size: int, grad: Tensor | None
) -> None:
    """Forward of rows compared as they are. ``size``: floats from layer to layer in ``saved``."""
    call = calls[0]
    student, teacher, weights, denominator = call.student, call.teacher, *call[7:9]
    device, width = student.device, student.shape[-1]
    mean, each = call.reduction == "mean", call.reduction == "none"

    def reduce(scale_only: bool) -> None:
        chunks = min(cdiv(m, CHUNK), MAX_CHUNKS) or 1
        chunk = cdiv(cdiv(m, chunks), CHUNK) * CHUNK
        REDUCE_ROWS(
            device,
            (cdiv(m, chunk) if m else 1, len(calls), 1),
            (loss, saved, weights, denominator),
            (size, m, chunk),
            (mean, each, CHUNK, MAX_CHUNKS, scale_only),
            4,
        )

    if m:
        if grad is not None and mean and denominator is None and weights is not None:
            saved[TICKET.value].zero_()
            reduce(scale_only=True)  # the gradient is formed before all rows have been summed
        where = geometry(student, teacher, grad)
        config = _row_config(device, width, student, teacher, grad)
        kernel = IDENTITY_FORWARD
        if config is None:
            config, kernel = configs.wide_row(generation(device)), IDENTITY_FORWARD_WIDE
        kernel(
            device,
            (m, len(calls), 1),
            (
                tuple([one.student for one in calls]), tuple([one.teacher for one in calls]), grad,
                loss, saved, call.rows, call.teacher_rows, weights, denominator,
            ),
            (size, m, *where.strides),
            (
                KIND_CODES[call.kind], mean, each, width, config.columns, config.pieces,
                where.unit, where.flat, where.dense,
            ),
            config.warps,
        )  # fmt: skip
    reduce(scale_only=False)


def _identity_backward(
    calls: Sequence[GradCall], m: int, grads: tuple[Tensor, ...], accumulate: bool,
    grad_loss: Tensor, row_stride: int, layer_stride: int,
) -> None:  # fmt: skip
    """Backward of rows compared as they are."""
    call, grad = calls[0], grads[0]
    student, teacher = call.student, call.teacher
    assert student is not None
    assert teacher is not None
    device, width = grad.device, grad.shape[-1]
    where = geometry(student, teacher, grad)
    config = _row_config(device, width, student, teacher, grad)
    parts = 1
    if config is None or (accumulate and config.warps == 1 and config.pieces > 4):
        # Three tensors: half the pieces.
        warps = 4 if config is None else 1
        itemsize = max(student.element_size(), teacher.element_size(), grad.element_size())
        columns = configs.piece(generation(device), itemsize, warps)
        config = configs.RowConfig(columns, 4, warps)
        parts = cdiv(width, columns * 4)
    IDENTITY_BACKWARD(
        device,
        (m, len(calls), parts),
        (
            grads, tuple([one.student for one in calls]), tuple([one.teacher for one in calls]),
            tuple([one.saved for one in calls]), grad_loss, call.rows, call.teacher_rows,
            call.weights,
        ),
        (row_stride, layer_stride, m, *where.strides),
        (
            KIND_CODES[call.kind], accumulate, width, config.columns, config.pieces, where.unit,
            where.flat, where.dense,
        ),
        config.warps,
    )  # fmt: skip


def _saved_plan(student: Tensor, proj: Tensor) -> Plan:
    """The plan of ``saved``, which does not depend on the teacher."""
    rank, width = proj.shape  # plain numbers, also while a compiler traces shapes
    return plan(int(rank), int(width), 0, student.dtype, student.dtype)


def _project(call: LossCall, m: int, loss: Tensor, saved: Tensor) -> None:
    """Forward after a projection."""
    student, teacher, proj = call.student, call.teacher, call.student_proj
    assert proj is not None
    teacher_proj = call.teacher_proj
    device, (rank, width) = student.device, proj.shape
    projects_teacher = teacher_proj is not None
    teacher_width = teacher.shape[-1] if projects_teacher else 0
    layout = plan(rank, width, teacher_width, student.dtype, teacher.dtype)
    k = layout.k
    has_float = student.dtype is torch.float32 or (
        projects_teacher and teacher.dtype is torch.float32
    )
    products = PRODUCTS[torch.get_float32_matmul_precision()]
    arch, wanted = generation(device), processors(device)
    block = min(layout.forward_k, RANK_BLOCK)
    config = configs.projection(arch, block, has_float)
    blocks = cdiv(m, config.rows)
    few = 2 * blocks < wanted
    fused = configs.fuses(k, has_float) and not few
    parts = 1
    if not fused:
        config = configs.project(arch, block, has_float, few)
        comparison = configs.comparison(arch, next_power_of_2(layout.forward_k))
        row_blocks, rank_blocks = cdiv(m, config.rows), layout.forward_k // block
        blocks, z_rows = row_blocks * rank_blocks, row_blocks * config.rows
        parts = max(min(2 * wanted // (blocks * (1 + projects_teacher)), 8), 1)
        programs = cdiv(m, comparison.rows)
        z_at = layout.rest + aligned(programs * SUMS.value)
        work_size = z_at + (1 + projects_teacher) * parts * z_rows * layout.forward_k
    else:
        work_size = layout.rest + blocks * SUMS.value
    work = new_floats((work_size,), device)
    types = TYPES[student.dtype], TYPES[teacher.dtype]
    sizes = (width, layout.student_columns, teacher_width, layout.teacher_columns)
    terms = (layout.student_terms, layout.teacher_terms)
    PREPARE(
        device,
        (k, 1 + projects_teacher, 1),
        (proj, teacher_proj, call.teacher_mean, saved, work),
        (rank,),
        (*types, k, *sizes, layout.operand, *terms, 1024),
        4,
    )
    where = geometry(student, teacher)
    flags = (where.unit, where.flat, where.dense)
    kind, mean, each = KIND_CODES[call.kind], call.reduction == "mean", call.reduction == "none"
    pointers = (call.rows, call.teacher_rows, call.weights)
    if fused:
        PROJECTED_FORWARD(
            device,
            (blocks, 1, 1),
            (
                student, teacher, call.teacher_mean, loss, saved, work, *pointers, call.denominator,
            ),
            (m, *where.strides),
            (
                kind, mean, each, rank, config.rows, config.columns, block, k, layout.dz_k,
                projects_teacher,
                layout.half_dz, products, *flags, *sizes, layout.scales, *terms, layout.rest, 512,
            ),
            config.warps,
            config.stages,
        )  # fmt: skip
        return
    part = [cdiv(cdiv(n, config.columns), parts) for n in (width, teacher_width)]
    PROJECT(
        device,
        (blocks, parts, 1 + projects_teacher),
        (student, teacher, call.teacher_mean, saved, work, *pointers),
        (m, *where.strides, *part, z_at // ALIGN.value, z_rows),
        (
            config.rows,
            config.columns,
            block,
            rank_blocks,
            k,
            products,
            *flags,
            *sizes,
            *terms,
        ),
        config.warps,
        config.stages,
    )
    COMPARE(
        device,
        (programs, 1, 1),
        (
            work, student, teacher, call.teacher_mean, loss, saved, call.teacher_rows, call.weights,
            call.denominator,
        ),
        (z_at // ALIGN.value, z_rows, parts, m, *where.strides[4:]),
        (
            kind, mean, each, rank, comparison.rows, layout.forward_k, layout.dz_k, k,
            comparison.ranks, projects_teacher,
            layout.half_dz, where.unit, where.flat, layout.scales, layout.rest, 512,
        ),
        comparison.warps,
    )  # fmt: skip


def _projected_backward(
    call: GradCall, m: int, grad: Tensor, accumulate: bool, grad_loss: Tensor
) -> None:
    """The gradient of the student after a projection."""
    assert call.student_proj is not None
    device, arch = grad.device, generation(grad.device)
    layout = _saved_plan(grad, call.student_proj)
    width, k = grad.shape[-1], layout.k
    where = geometry(grad)
    row_stride = grad_loss.stride(0) if grad_loss.dim() else 0
    pointers = (grad, call.saved, grad_loss, call.rows, call.weights)
    places = (width, layout.student_columns, layout.operand, layout.scales)
    flags = (where.unit, where.flat, where.dense)
    if layout.half_dz and k in configs.RESIDENT_RANKS:
        config = configs.half_backward(arch, k, accumulate)
        blocks = cdiv(m, config.rows)
        parts = cdiv(4 * processors(device), blocks)
        columns = cdiv(width, config.columns)
        part = cdiv(columns, parts)
        HALF_BACKWARD(
            device,
            (blocks, cdiv(columns, part), 1),
            pointers,
            (row_stride, m, *where.strides, part),
            (accumulate, config.rows, config.columns, k, layout.dz_k, *places, *flags),
            config.warps,
            config.stages,
        )
        return
    config = configs.tiled_backward(arch, k)
    products = half_float_products(grad.dtype)
    TILED_BACKWARD(
        device,
        (cdiv(width, config.columns), cdiv(m, config.rows), 1),
        pointers,
        (row_stride, m, *where.strides),
        (
            accumulate, config.rows, config.columns, config.ranks, k, layout.dz_k, products,
            layout.half_dz, *places, *flags,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip


def _projector_gradient(call: GradCall, grad_loss: Tensor) -> Tensor:
    """The gradient of the student's projector."""
    student, proj = call.student, call.student_proj
    assert student is not None
    assert proj is not None
    m, device = num_rows(student, call.rows), student.device
    if not m:
        return torch.zeros_like(proj, memory_format=torch.contiguous_format)
    layout = _saved_plan(student, proj)
    (rank, width), k = proj.shape, layout.k
    config = configs.projector_gradient(generation(device), k)
    tiles = cdiv(width, config.columns), k // config.ranks
    parts = max(min(2 * processors(device) // (tiles[0] * tiles[1]), cdiv(m, 4 * config.rows)), 1)
    chunk = cdiv(cdiv(m, parts), config.rows) * config.rows
    parts = cdiv(m, chunk)
    partial = new_floats((parts, k, layout.student_columns), device)
    where = geometry(student)
    PROJECTOR_GRADIENT(
        device,
        (*tiles, parts),
        (partial, student, call.saved, grad_loss, call.rows, call.weights),
        (grad_loss.stride(0) if grad_loss.dim() else 0, m, *where.strides, chunk),
        (
            config.rows, config.columns, config.ranks, k, layout.dz_k,
            half_float_products(student.dtype),
            layout.half_dz, width, layout.student_columns, layout.scales, where.unit, where.flat,
            where.dense,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip
    return partial.sum(0)[:rank, :width].to(proj.dtype).contiguous()
