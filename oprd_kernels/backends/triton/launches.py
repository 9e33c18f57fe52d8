"""The launches of a call: grids, scalars, constants and configurations of its kernels.

They depend on the options of the call and the forms of its tensors (`geometry.Form`). The launches
of the most recent calls are cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from oprd_kernels.backends.triton import configs
from oprd_kernels.backends.triton.geometry import Form, Geometry, geometry
from oprd_kernels.backends.triton.identity import identity_backward, identity_forward
from oprd_kernels.backends.triton.identity_wide import identity_forward_wide
from oprd_kernels.backends.triton.launch import Kernel, Launch
from oprd_kernels.backends.triton.operands import (
    PRODUCTS,
    RANK_BLOCK,
    Plan,
    next_power_of_2,
    plan,
    prepare,
)
from oprd_kernels.backends.triton.projected import BOTH, compare, project, projected_forward
from oprd_kernels.backends.triton.projected_gradients import (
    half_backward,
    projector_gradient,
    tiled_backward,
)
from oprd_kernels.backends.triton.reduction import reduce_rows
from oprd_kernels.backends.triton.saved import ALIGN, SUMS, aligned

KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = triton.knobs.runtime.interpret
MAX_CHUNKS = 64
"""The most programs of the reduction without a projection."""
CHUNK = 1024
"""Number of rows that such a program sums at a time."""
KEPT = 512
"""Number of different calls whose launches are cached."""

Launches = TypeVar("Launches")

IDENTITY_FORWARD, IDENTITY_BACKWARD = Kernel(identity_forward), Kernel(identity_backward)
IDENTITY_FORWARD_WIDE, REDUCE_ROWS = Kernel(identity_forward_wide), Kernel(reduce_rows)
PREPARE, PROJECTED_FORWARD = Kernel(prepare), Kernel(projected_forward)
PROJECT, COMPARE = Kernel(project), Kernel(compare)
HALF_BACKWARD, TILED_BACKWARD = Kernel(half_backward), Kernel(tiled_backward)
PROJECTOR_GRADIENT = Kernel(projector_gradient)


def kept(build: Callable[..., Launches]) -> Callable[..., Launches]:
    """Cache the results of ``build``, except in the interpreter, where tests change block sizes."""
    return build if INTERPRETED else functools.lru_cache(KEPT)(build)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def half_float_products(dtype: torch.dtype, precision: str) -> int:
    """Return the number of products of terms for states or gradients that are not bfloat16."""
    return PRODUCTS[precision] if dtype is torch.float32 else 3


def _row_config(arch: str, width: int, *forms: Form | None) -> configs.RowConfig | None:
    return configs.row(arch, width, max([x[2].itemsize for x in forms if x is not None]))


class IdentityLaunches(NamedTuple):
    """The launches of forward without a projection."""

    scale: Launch  # sums the weights
    forward: Launch
    reduce: Launch


@kept
def identity_launches(
    kind: str, reduction: str, layers: int, m: int, size: int, arch: str,
    student: Form, teacher: Form, grad: Form | None,
) -> IdentityLaunches:  # fmt: skip
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
    if config is None:
        config, kernel = configs.wide_row(arch), IDENTITY_FORWARD_WIDE
        blocks: tuple[int, ...] = (config.columns,)
    else:
        kernel, blocks = IDENTITY_FORWARD, (config.columns, config.pieces)
    forward = Launch(
        kernel,
        (m, layers, 1),
        (size, m, *where.strides),
        (KIND_CODES[kind], mean, each, width, *blocks, where.unit, where.flat, where.dense),
        config.warps,
    )
    return IdentityLaunches(scale, forward, reduce)


@kept
def identity_backward_launch(
    kind: str, layers: int, m: int, accumulate: bool, row_stride: int, layer_stride: int, arch: str,
    student: Form, teacher: Form, grad: Form,
) -> Launch:  # fmt: skip
    width = grad[0][-1]
    where = geometry(student, teacher, grad)
    config = _row_config(arch, width, student, teacher, grad)
    parts = 1
    if config is None or (accumulate and config.warps == 1 and config.pieces > 4):
        # Backward that accumulates reads three tensors, so a program holds half as many pieces.
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


class ProjectLaunches(NamedTuple):
    """The launches of forward with a projection."""

    work_size: int
    prepare: Launch
    projects: list[Launch]
    compare: Launch | None  # None if the kernel in `projects` also compares


class _Projection(NamedTuple):
    """What the launches of forward with a projection have in common.

    Attributes:
        few: Whether there are too few rows to keep the device busy with one program per block of
            rows.
        options: The constants KIND, MEAN, EACH and RANK.
        sizes: The constants S_WIDTH, S_COLUMNS, T_WIDTH and T_COLUMNS.
        terms: The constants S_TERMS and T_TERMS.
    """

    m: int
    arch: str
    wanted: int
    layout: Plan
    where: Geometry
    projects_teacher: bool
    same_dtype: bool
    has_float: bool
    products: int
    block: int
    few: bool
    options: tuple[int, bool, bool, int]
    sizes: tuple[int, int, int, int]
    terms: tuple[int, int]


@kept
def project_launches(
    kind: str, reduction: str, m: int, rank: int, projects_teacher: bool, precision: str, arch: str,
    wanted: int, student: Form, teacher: Form,
) -> ProjectLaunches:  # fmt: skip
    width, dtype, teacher_dtype = student[0][-1], student[2], teacher[2]
    teacher_width = teacher[0][-1] if projects_teacher else 0
    layout = plan(rank, width, teacher_width, dtype, teacher_dtype)
    has_float = dtype is torch.float32 or (projects_teacher and teacher_dtype is torch.float32)
    block = min(layout.forward_k, RANK_BLOCK)
    rows = configs.projection(arch, block, has_float).rows
    call = _Projection(
        m=m,
        arch=arch,
        wanted=wanted,
        layout=layout,
        where=geometry(student, teacher),
        projects_teacher=projects_teacher,
        same_dtype=dtype is teacher_dtype,
        has_float=has_float,
        products=PRODUCTS[precision],
        block=block,
        few=2 * cdiv(m, rows) < wanted,
        options=(KIND_CODES[kind], reduction == "mean", reduction == "none", rank),
        sizes=(width, layout.student_columns, teacher_width, layout.teacher_columns),
        terms=(layout.student_terms, layout.teacher_terms),
    )
    types = TYPES[dtype], TYPES[teacher_dtype]
    prepare = Launch(
        PREPARE,
        (layout.k, 1 + projects_teacher, 1),
        (rank,),
        (*types, layout.k, *call.sizes, layout.operand, *call.terms, 1024),
        4,
    )
    if configs.fuses(layout.k, has_float) and not call.few:
        return _fused(call, prepare)
    return _separate(call, prepare)


def _fused(call: _Projection, prepare: Launch) -> ProjectLaunches:
    """Return launches of one kernel that projects and compares."""
    layout, where = call.layout, call.where
    config = configs.projection(call.arch, call.block, call.has_float)
    blocks = cdiv(call.m, config.rows)
    forward = Launch(
        PROJECTED_FORWARD,
        (blocks, 1, 1),
        (call.m, *where.strides),
        (
            *call.options, config.rows, config.columns, call.block, layout.k, layout.dz_k,
            call.projects_teacher, layout.half_dz, call.products, where.unit, where.flat,
            where.dense, *call.sizes, layout.scales, *call.terms, layout.rest, 512,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip
    return ProjectLaunches(layout.rest + blocks * SUMS.value, prepare, [forward], None)


def _separate(call: _Projection, prepare: Launch) -> ProjectLaunches:
    """Return launches of one kernel that projects to z and one that compares.

    The workspace holds the sums of the comparing programs, then z: one part of z_rows rows for each
    part of the width.
    """
    layout, where = call.layout, call.where
    config = configs.project(call.arch, call.block, call.has_float, call.few)
    comparison = configs.comparison(call.arch, next_power_of_2(layout.forward_k))
    row_blocks, rank_blocks = cdiv(call.m, config.rows), layout.forward_k // call.block
    blocks, z_rows = row_blocks * rank_blocks, row_blocks * config.rows
    projectors = 1 + call.projects_teacher
    parts = max(min(2 * call.wanted // (blocks * projectors), 8), 1)
    programs = cdiv(call.m, comparison.rows)
    z_at = layout.rest + aligned(programs * SUMS.value)
    width, _, teacher_width, _ = call.sizes
    part = [cdiv(cdiv(n, config.columns), parts) for n in (width, teacher_width)]
    sides = list(range(projectors))
    if call.projects_teacher and call.same_dtype:
        sides = [BOTH.value]
    projects = [
        Launch(
            PROJECT,
            (blocks, parts, 2 if side == BOTH.value else 1),
            (call.m, *where.strides, *part, z_at // ALIGN.value, z_rows),
            (
                config.rows, config.columns, call.block, rank_blocks, layout.k, call.products,
                where.unit, where.flat, where.dense, *call.sizes, *call.terms, side,
            ),
            config.warps,
            config.stages,
        )
        for side in sides
    ]  # fmt: skip
    compare = Launch(
        COMPARE,
        (programs, 1, 1),
        (z_at // ALIGN.value, z_rows, parts, call.m, *where.strides[4:]),
        (
            *call.options, comparison.rows, layout.forward_k, layout.dz_k, layout.k,
            comparison.ranks, call.projects_teacher, layout.half_dz, where.unit, where.flat,
            layout.scales, layout.rest, 512,
        ),
        comparison.warps,
    )  # fmt: skip
    work_size = z_at + projectors * parts * z_rows * layout.forward_k
    return ProjectLaunches(work_size, prepare, projects, compare)


@kept
def projected_backward_launch(
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
    config = configs.tiled_backward(arch, k, accumulate)
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


class ProjectorGradientLaunches(NamedTuple):
    """The launch for the gradient of the student's projector."""

    shape: tuple[int, int, int]  # shape of the partial sums
    launch: Launch


@kept
def projector_gradient_launches(
    m: int, rank: int, row_stride: int, precision: str, arch: str, wanted: int, student: Form
) -> ProjectorGradientLaunches:
    width, dtype = student[0][-1], student[2]
    layout = plan(rank, width, 0, dtype, dtype)
    k = layout.k
    config = configs.projector_gradient(arch, k, dtype is torch.float32)
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
    return ProjectorGradientLaunches((parts, k, layout.student_columns), launch)
