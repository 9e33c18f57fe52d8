"""Backward kernels with a projection: dH = (g dz) P and dP = (g dz)' H.

`operands` describes how products are formed. Shapes: R rows of a program; D columns and BK ranks at
a time; K ranks (r padded).
"""

import triton
import triton.language as tl

from oprd_kernels.backends.triton.operands import (
    add_products,
    magnitude,
    power_of_2,
    rest_of_dz,
    rounded,
    terms_of,
)
from oprd_kernels.backends.triton.pair import launched, row_starts, row_weights
from oprd_kernels.backends.triton.saved import HEAD, SCALE, aligned_rows


@triton.jit
def coefficients(saved, grad_loss, grad_loss_row, weights, i_R, in_range_R):
    """Return the chain rule's factors (R,) of the rows, and which rows get a gradient."""
    weight_R = row_weights(weights, i_R, in_range_R)
    scale = tl.load(saved + SCALE)
    active_R = (weight_R != 0) & (scale != 0)
    at_R = grad_loss + i_R.to(tl.int64) * grad_loss_row
    upstream_R = tl.load(at_R, mask=active_R, other=0.0)
    return upstream_R * scale * weight_R, active_R


@triton.jit
def put_gradient(
    g_R, last, d_D, acc_RD, in_range_R, active_R, WIDTH: tl.constexpr, D: tl.constexpr,
    DENSE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Write or add (R, D) elements of the gradient.

    Rows that get no gradient are set to 0, or left unchanged with ACCUMULATE.
    """
    at_RD = g_R[:, None] + (d_D if DENSE else d_D.to(tl.int64) * last)[None, :]
    mask_RD = (active_R if ACCUMULATE else in_range_R)[:, None]
    if WIDTH % D != 0:
        mask_RD = mask_RD & (d_D < WIDTH)[None, :]
    if ACCUMULATE:
        acc_RD += tl.load(at_RD, mask=mask_RD, other=0.0).to(tl.float32)
    else:
        acc_RD = tl.where(active_R[:, None], acc_RD, 0.0)
    tl.store(at_RD, acc_RD.to(g_R.dtype.element_ty), mask=mask_RD)


@launched
def half_backward(
    grad, saved, grad_loss, rows, weights, grad_loss_row, m, g_inner, g_outer, g_stride, g_last,
    part, ACCUMULATE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    DZ_K: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr, SCALES: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute bfloat16 gradients: dz of R rows stays on chip while the kernel iterates over P.

    The program starts at column program_id(1) * part * D.
    """
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    k_K = tl.arange(0, K)
    dz = (saved + SCALES + aligned_rows(m)).to(tl.pointer_type(tl.float16))
    at_RK = i_R.to(tl.int64)[:, None] * DZ_K + k_K[None, :]
    mask_RK = in_range_R[:, None]
    if DZ_K < K:
        mask_RK = mask_RK & (k_K < DZ_K)[None, :]
    # The operand is P / sigma, so dz is multiplied by sigma. Its rows are then scaled back into the
    # range of float16.
    dz_RK = tl.load(dz + at_RK, mask=mask_RK, other=0.0).to(tl.float32)
    dz_RK *= tl.load(saved + HEAD + k_K)[None, :]
    scale_R, inverse_R = power_of_2(tl.max(magnitude(dz_RK), axis=1))
    half_RK = (dz_RK * inverse_R[:, None]).to(tl.float16)
    coefficient_R, active_R = coefficients(
        saved, grad_loss, grad_loss_row, weights, i_R, in_range_R
    )
    coefficient_R *= tl.load(saved + SCALES + i_R, mask=in_range_R, other=0.0) * scale_R
    g_R = grad + row_starts(rows, i_R, in_range_R, g_inner, g_outer, g_stride, UNIT, FLAT)
    operand = (saved + OPERAND).to(tl.pointer_type(tl.float16))
    begin = tl.program_id(1) * part * D
    for first in range(begin, tl.minimum(begin + part * D, WIDTH), D):
        d_D = first + tl.arange(0, D)
        p_KD = tl.load(operand + k_K[:, None] * COLUMNS + d_D[None, :])
        acc_RD = tl.dot(half_RK, p_KD) * coefficient_R[:, None]
        put_gradient(g_R, g_last, d_D, acc_RD, in_range_R, active_R, WIDTH, D, DENSE, ACCUMULATE)


@launched
def tiled_backward(
    grad, saved, grad_loss, rows, weights, grad_loss_row, m, g_inner, g_outer, g_stride, g_last,
    ACCUMULATE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, K: tl.constexpr,
    DZ_K: tl.constexpr, ALL_K: tl.constexpr, PRODUCTS: tl.constexpr, HALF_DZ: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr, SCALES: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the gradient for any dtype and rank, BK ranks at a time.

    ALL_K is K rounded up to a power of 2.
    """
    tiles: tl.constexpr = (WIDTH + D - 1) // D
    i_R = tl.program_id(0) // tiles * R + tl.arange(0, R)
    in_range_R = i_R < m
    d_D = tl.program_id(0) % tiles * D + tl.arange(0, D)
    coefficient_R, active_R = coefficients(
        saved, grad_loss, grad_loss_row, weights, i_R, in_range_R
    )
    acc_RD = tl.zeros((R, D), tl.float32)
    dz = saved + SCALES
    operand = (saved + OPERAND).to(tl.pointer_type(tl.bfloat16))
    biggest = 1.0
    if HALF_DZ:
        k_N = tl.arange(0, ALL_K)
        biggest = tl.max(tl.load(saved + HEAD + k_N, mask=k_N < K, other=0.0), axis=0)
        coefficient_R *= tl.load(saved + SCALES + i_R, mask=in_range_R, other=0.0) * biggest
        dz = (saved + SCALES + aligned_rows(m)).to(tl.pointer_type(tl.float16))
        operand = (saved + OPERAND).to(tl.pointer_type(tl.float16))
    for first in range(0, K, BK):
        k_K = first + tl.arange(0, BK)
        at_RK = i_R.to(tl.int64)[:, None] * DZ_K + k_K[None, :]
        mask_RK = in_range_R[:, None]
        if DZ_K < K:
            mask_RK = mask_RK & (k_K < DZ_K)[None, :]
        dz_RK = tl.load(dz + at_RK, mask=mask_RK, other=0.0)
        at_KD = operand + k_K[:, None] * COLUMNS + d_D[None, :]
        p_KD = tl.load(at_KD)
        if HALF_DZ:  # the operand is P / sigma, so dz is multiplied by sigma, a power of two
            sigma_K = tl.load(saved + HEAD + k_K) / biggest
            half_RK = (dz_RK.to(tl.float32) * sigma_K[None, :]).to(tl.float16)
            acc_RD = tl.dot(half_RK, p_KD, acc_RD)
        else:
            middle_KD = p_KD
            low_KD = p_KD
            if PRODUCTS >= 3:
                middle_KD = tl.load(at_KD + K * COLUMNS)
            if PRODUCTS == 6:
                low_KD = tl.load(at_KD + 2 * K * COLUMNS)
            high, middle, low = terms_of(dz_RK, PRODUCTS)
            acc_RD = add_products(
                high, middle, low, p_KD, middle_KD, low_KD, acc_RD, PRODUCTS
            )  # fmt: skip
    acc_RD *= coefficient_R[:, None]
    g_R = grad + row_starts(rows, i_R, in_range_R, g_inner, g_outer, g_stride, UNIT, FLAT)
    put_gradient(g_R, g_last, d_D, acc_RD, in_range_R, active_R, WIDTH, D, DENSE, ACCUMULATE)


@launched
def projector_gradient(
    partial, student, saved, grad_loss, rows, weights, grad_loss_row, m,
    s_inner, s_outer, s_stride, s_last, chunk,
    R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, DZ_K: tl.constexpr,
    PRODUCTS: tl.constexpr, HALF_DZ: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    SCALES: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute partial[part] (K, COLUMNS) = (g dz)' H over rows [part * chunk, (part + 1) * chunk).

    Programs: (blocks of columns, blocks of ranks, parts). With bfloat16 states, dz is split into
    two bfloat16 terms and the states are one term. With other states, both are split into as many
    terms as PRODUCTS requires.
    """
    d_D = tl.program_id(0) * D + tl.arange(0, D)
    k_K = tl.program_id(1) * BK + tl.arange(0, BK)
    acc_KD = tl.zeros((BK, D), tl.float32)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, m)
    for first in range(begin, end, R):
        i_R = first + tl.arange(0, R)
        in_range_R = i_R < end
        coefficient_R, active_R = coefficients(
            saved, grad_loss, grad_loss_row, weights, i_R, in_range_R
        )
        at_RK = i_R.to(tl.int64)[:, None] * DZ_K + k_K[None, :]
        mask_RK = active_R[:, None] & (k_K < DZ_K)[None, :]
        if HALF_DZ:
            dz = (saved + SCALES + aligned_rows(m)).to(tl.pointer_type(tl.float16))
            dz_RK = tl.load(dz + at_RK, mask=mask_RK, other=0.0).to(tl.float32)
            rest = dz + rest_of_dz(m, DZ_K)
            dz_RK += tl.load(rest + at_RK, mask=mask_RK, other=0.0).to(tl.float32)
            coefficient_R *= tl.load(saved + SCALES + i_R, mask=active_R, other=0.0)
            dz_RK *= coefficient_R[:, None]
        else:
            dz_RK = tl.load(saved + SCALES + at_RK, mask=mask_RK, other=0.0)
            dz_RK *= coefficient_R[:, None]
        row_R = row_starts(rows, i_R, in_range_R, s_inner, s_outer, s_stride, UNIT, FLAT)
        at_RD = student + row_R[:, None] + (d_D if DENSE else d_D.to(tl.int64) * s_last)[None, :]
        h_RD = tl.load(at_RD, mask=active_R[:, None] & (d_D < WIDTH)[None, :], other=0.0)
        if student.dtype.element_ty == tl.bfloat16:
            high_RK, rest_RK = rounded(dz_RK, tl.bfloat16)
            acc_KD = tl.dot(tl.trans(rest_RK.to(tl.bfloat16)), h_RD, acc_KD)
            acc_KD = tl.dot(tl.trans(high_RK), h_RD, acc_KD)
        else:
            a, a_middle, a_low = terms_of(dz_RK, PRODUCTS)
            b, b_middle, b_low = terms_of(h_RD.to(tl.float32), PRODUCTS)
            acc_KD = add_products(
                tl.trans(a), tl.trans(a_middle), tl.trans(a_low), b, b_middle, b_low, acc_KD,
                PRODUCTS,
            )  # fmt: skip
    at_KD = partial + ((tl.program_id(2) * K + k_K) * COLUMNS)[:, None] + d_D[None, :]
    tl.store(at_KD, acc_KD)
