"""Rows compared as they are: statistics, and the gradient in forward or in backward.

A program takes R whole rows of both tensors into registers, where they stay between their uses:
global memory is read once. Rows wider than configs.MAX_ROW_BLOCK are read again, out of L2.
"""

import triton
import triton.language as tl

from oprd_kernels.triton_backend.pair import (
    COSINE,
    EPS,
    MSE,
    ROW_STATS,
    SCALE,
    SHRINK,
    STATS,
    load_block,
    pair_gradient,
    pair_stats,
    put_stats,
    reduction_factor,
    row_offsets,
    row_weights,
)


@triton.jit(do_not_specialize=["m"])
def identity_forward(
    student, teacher, grad, loss, saved, rows, teacher_rows, weights, denominator, m, width,
    student_inner, student_outer, student_stride, student_last,
    teacher_inner, teacher_outer, teacher_stride, teacher_last,
    grad_inner, grad_outer, grad_stride, grad_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """With ``grad`` (the teacher's own memory, perhaps) also the gradient of the reduced loss."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    d_D = tl.arange(0, D)
    read_RD = (weight_R != 0)[:, None] & (d_D < width)[None, :]
    s_R = row_offsets(rows, i_R, in_range_R, student_inner, student_outer, student_stride)
    t_R = row_offsets(teacher_rows, i_R, in_range_R, teacher_inner, teacher_outer, teacher_stride)
    s_RD = load_block(student, s_R, d_D, student_last, read_RD)
    t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD)
    loss_R, inv_s_R, inv_t_R, omc_R = pair_stats(s_RD, t_RD, width, KIND)
    put_stats(loss, saved, i_R, in_range_R, m, weight_R, loss_R, inv_s_R, inv_t_R, omc_R, EACH)
    if grad is not None:
        coefficient_R = reduction_factor(denominator, m, MEAN) * weight_R
        g_RD = pair_gradient(s_RD, t_RD, inv_s_R, inv_t_R, omc_R, coefficient_R, width, KIND)
        g_RD = tl.where((coefficient_R != 0)[:, None], g_RD, 0.0)
        g_R = row_offsets(None, i_R, in_range_R, grad_inner, grad_outer, grad_stride)
        g_at = grad + g_R[:, None] + d_D[None, :] * grad_last
        write_RD = in_range_R[:, None] & (d_D < width)[None, :]
        tl.store(g_at, g_RD.to(grad.dtype.element_ty), mask=write_RD)


@triton.jit(do_not_specialize=["m"])
def identity_forward_wide(
    student, teacher, grad, loss, saved, rows, teacher_rows, weights, denominator, m, width,
    student_inner, student_outer, student_stride, student_last,
    teacher_inner, teacher_outer, teacher_stride, teacher_last,
    grad_inner, grad_outer, grad_stride, grad_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The same for rows wider than D: R = 1, in blocks."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    s_R = row_offsets(rows, i_R, in_range_R, student_inner, student_outer, student_stride)
    t_R = row_offsets(teacher_rows, i_R, in_range_R, teacher_inner, teacher_outer, teacher_stride)
    valid_RD = (weight_R != 0)[:, None] & (tl.arange(0, D) >= 0)[None, :]

    s_squares_RD = tl.zeros((R, D), tl.float32)
    t_squares_RD = tl.zeros((R, D), tl.float32)
    for begin in range(0, width, D):
        d_D = begin + tl.arange(0, D)
        read_RD = valid_RD & (d_D < width)[None, :]
        s_RD = load_block(student, s_R, d_D, student_last, read_RD)
        t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD)
        s_squares_RD += s_RD * s_RD
        t_squares_RD += t_RD * t_RD
    s_sum_R = tl.sum(s_squares_RD, axis=1)
    t_sum_R = tl.sum(t_squares_RD, axis=1)
    s_factor_R = tl.where(s_sum_R == float("inf"), SHRINK, 1.0)
    t_factor_R = tl.where(t_sum_R == float("inf"), SHRINK, 1.0)
    if tl.min(tl.minimum(s_factor_R, t_factor_R), axis=0) < 1.0:
        s_squares_RD = tl.zeros((R, D), tl.float32)
        t_squares_RD = tl.zeros((R, D), tl.float32)
        for begin in range(0, width, D):
            d_D = begin + tl.arange(0, D)
            read_RD = valid_RD & (d_D < width)[None, :]
            s_RD = load_block(student, s_R, d_D, student_last, read_RD) * s_factor_R[:, None]
            t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD) * t_factor_R[:, None]
            s_squares_RD += s_RD * s_RD
            t_squares_RD += t_RD * t_RD
        s_sum_R = tl.sum(s_squares_RD, axis=1)
        t_sum_R = tl.sum(t_squares_RD, axis=1)
    s_norm_R, t_norm_R = tl.sqrt_rn(s_sum_R), tl.sqrt_rn(t_sum_R)
    zero_R = s_norm_R <= EPS
    inv_s_R = tl.div_rn(s_factor_R, tl.where(zero_R, EPS, s_norm_R))
    inv_t_R = tl.div_rn(t_factor_R, tl.where(t_norm_R <= EPS, EPS, t_norm_R))

    distance_RD = tl.zeros((R, D), tl.float32)
    radial_RD = tl.zeros((R, D), tl.float32)
    for begin in range(0, width, D):
        d_D = begin + tl.arange(0, D)
        read_RD = valid_RD & (d_D < width)[None, :]
        s_RD = load_block(student, s_R, d_D, student_last, read_RD)
        t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD)
        unit_RD = s_RD * inv_s_R[:, None]
        e_RD = unit_RD - t_RD * inv_t_R[:, None]
        radial_RD += unit_RD * e_RD
        if KIND == MSE:
            e_RD = s_RD - t_RD
        distance_RD += e_RD * e_RD
    loss_R = tl.sum(distance_RD, axis=1)
    loss_R = tl.div_rn(loss_R, tl.zeros_like(loss_R) + (2 if KIND == COSINE else width))
    omc_R = tl.where(zero_R, 1.0, tl.sum(radial_RD, axis=1))
    inv_s_R = tl.where(zero_R, 0.0, inv_s_R)
    put_stats(loss, saved, i_R, in_range_R, m, weight_R, loss_R, inv_s_R, inv_t_R, omc_R, EACH)
    if grad is not None:
        coefficient_R = reduction_factor(denominator, m, MEAN) * weight_R
        g_R = row_offsets(None, i_R, in_range_R, grad_inner, grad_outer, grad_stride)
        for begin in range(0, width, D):
            d_D = begin + tl.arange(0, D)
            read_RD = valid_RD & (d_D < width)[None, :]
            s_RD = load_block(student, s_R, d_D, student_last, read_RD)
            t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD)
            g_RD = pair_gradient(s_RD, t_RD, inv_s_R, inv_t_R, omc_R, coefficient_R, width, KIND)
            g_RD = tl.where((coefficient_R != 0)[:, None], g_RD, 0.0)
            g_at = grad + g_R[:, None] + d_D[None, :] * grad_last
            write_RD = in_range_R[:, None] & (d_D < width)[None, :]
            tl.store(g_at, g_RD.to(grad.dtype.element_ty), mask=write_RD)


@triton.jit(do_not_specialize=["m"])
def identity_backward(
    grad, student, teacher, saved, grad_loss, grad_loss_stride, rows, teacher_rows, weights, m,
    width,
    student_inner, student_outer, student_stride, student_last,
    teacher_inner, teacher_outer, teacher_stride, teacher_last,
    grad_inner, grad_outer, grad_stride, grad_last,
    KIND: tl.constexpr, ACCUMULATE: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write, or ACCUMULATE, the gradient in the supervised rows of ``grad``: R rows, D columns."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    scale = tl.load(saved + SCALE)
    active_R = tl.where(scale == 0, 0.0, weight_R) != 0
    upstream_at = grad_loss + i_R.to(tl.int64) * grad_loss_stride
    upstream_R = tl.load(upstream_at, mask=active_R, other=0.0)
    coefficient_R = upstream_R * scale * weight_R
    row = saved + STATS + ROW_STATS * i_R.to(tl.int64)
    inv_s_R = tl.load(row, mask=active_R, other=0.0)
    inv_t_R = tl.load(row + 1, mask=active_R, other=0.0)
    omc_R = tl.load(row + 2, mask=active_R, other=0.0)

    d_D = tl.program_id(1) * D + tl.arange(0, D)
    read_RD = active_R[:, None] & (d_D < width)[None, :]
    s_R = row_offsets(rows, i_R, in_range_R, student_inner, student_outer, student_stride)
    t_R = row_offsets(teacher_rows, i_R, in_range_R, teacher_inner, teacher_outer, teacher_stride)
    g_R = row_offsets(rows, i_R, in_range_R, grad_inner, grad_outer, grad_stride)
    g_at = grad + g_R[:, None] + d_D[None, :] * grad_last
    s_RD = load_block(student, s_R, d_D, student_last, read_RD)
    t_RD = load_block(teacher, t_R, d_D, teacher_last, read_RD)
    g_RD = pair_gradient(s_RD, t_RD, inv_s_R, inv_t_R, omc_R, coefficient_R, width, KIND)
    if ACCUMULATE:
        old_RD = tl.load(g_at, mask=read_RD, other=0.0).to(tl.float32)
        tl.store(g_at, (old_RD + g_RD).to(grad.dtype.element_ty), mask=read_RD)
    else:
        g_RD = tl.where(active_R[:, None], g_RD, 0.0)
        write_RD = in_range_R[:, None] & (d_D < width)[None, :]
        tl.store(g_at, g_RD.to(grad.dtype.element_ty), mask=write_RD)
