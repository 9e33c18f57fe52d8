"""Forward kernels with a projection: z = P h in one pass over the hidden states.

Up to 128 ranks, a program computes dz of R rows from the states of both models. The accumulators of
more ranks do not fit, and few rows would leave most of the GPU idle. In these cases `project`
writes z to the workspace, in parts over the columns, and `compare` reads it from there.

`operands` describes how products are formed. Shapes: R rows of a program; D columns at a time; K
ranks (r padded).
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
from oprd_kernels.backends.triton.pair import (
    gradient_factor,
    launched,
    pair_gradient,
    pair_stats,
    row_starts,
    row_weights,
)
from oprd_kernels.backends.triton.reduction import finish, leave_sums
from oprd_kernels.backends.triton.saved import ALIGN, HEAD, aligned_rows

BOTH = tl.constexpr(2)
"""The value of SIDE in `project` for both sides in one launch."""


@triton.jit
def load_states(x_R, last, first, width, D: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr):
    """Load D columns from ``first`` on of the rows that begin at x_R; 0 past their end."""
    d_D = first + tl.arange(0, D)
    at_RD = x_R[:, None] + (d_D if DENSE else d_D.to(tl.int64) * last)[None, :]
    if EVEN:
        return tl.load(at_RD)
    else:
        return tl.load(at_RD, mask=(d_D < width)[None, :], other=0.0)


@triton.jit
def project_half(
    x_R, last, terms, k0, begin, end, width, columns, R: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Return products (R, K) of 16-bit states with the two terms of P / sigma, from rank k0 on."""
    if K <= 32:  # both terms as rows of one operand
        terms_N = terms + (2 * k0 + tl.arange(0, 2 * K)) * columns
        acc_RN = tl.zeros((R, 2 * K), tl.float32)
        for first in range(begin, end, D):
            h_RD = load_states(x_R, last, first, width, D, EVEN, DENSE)
            p_ND = tl.load(terms_N[:, None] + (first + tl.arange(0, D))[None, :])
            acc_RN = tl.dot(h_RD, tl.trans(p_ND), acc_RN)
        high_RK, low_RK = tl.split(tl.reshape(acc_RN, (R, K, 2)))
        return high_RK + low_RK
    else:
        terms_K = terms + (k0 + tl.arange(0, K)) * (2 * columns)
        z_RK = tl.zeros((R, K), tl.float32)
        for first in range(begin, end, D):
            h_RD = load_states(x_R, last, first, width, D, EVEN, DENSE)
            at_KD = terms_K[:, None] + (first + tl.arange(0, D))[None, :]
            z_RK = tl.dot(h_RD, tl.trans(tl.load(at_KD + columns)), z_RK)
            z_RK = tl.dot(h_RD, tl.trans(tl.load(at_KD)), z_RK)
        return z_RK


@triton.jit
def project_float(
    x_R, last, mean, has_mean, terms, plane, k0, begin, end, width, columns, R: tl.constexpr,
    D: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, DENSE: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Return products (R, K) of float32 states, minus ``mean`` if ``has_mean``, with P, from rank
    k0 on."""
    terms_K = terms + (k0 + tl.arange(0, K)) * columns
    z_RK = tl.zeros((R, K), tl.float32)
    for first in range(begin, end, D):
        d_D = first + tl.arange(0, D)
        h_RD = load_states(x_R, last, first, width, D, EVEN, DENSE)
        if mean is not None:  # subtracted after the product, z would be a difference of large sums
            h_RD -= tl.load(mean + d_D, mask=(d_D < width) & has_mean, other=0.0)[None, :]
        at_KD = terms_K[:, None] + d_D[None, :]
        p_KD = tl.load(at_KD)
        middle_KD = p_KD
        low_KD = p_KD
        if PRODUCTS >= 3:
            middle_KD = tl.load(at_KD + plane)
        if PRODUCTS == 6:
            low_KD = tl.load(at_KD + 2 * plane)
        h, h_middle, h_low = terms_of(h_RD, PRODUCTS)
        z_RK = add_products(
            h, h_middle, h_low, tl.trans(p_KD), tl.trans(middle_KD), tl.trans(low_KD), z_RK,
            PRODUCTS,
        )  # fmt: skip
    return z_RK


@triton.jit
def projection(
    x, row_R, last, mean, has_mean, terms, k0, begin, end, width, columns,
    R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    DENSE: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Return P (x - mean) (R, BK) over columns [begin, end), from rank k0 on.

    For 16-bit states, return (P / sigma) x, which `finished` completes.
    """
    x_R = x + row_R
    dtype: tl.constexpr = x.dtype.element_ty
    if dtype == tl.float32:
        floats = terms.to(tl.pointer_type(tl.bfloat16))
        return project_float(
            x_R, last, mean, has_mean, floats, K * columns, k0, begin, end, width, columns, R, D,
            BK, EVEN, DENSE, PRODUCTS,
        )  # fmt: skip
    else:
        halves = terms.to(tl.pointer_type(dtype))
        return project_half(
            x_R, last, halves, k0, begin, end, width, columns, R, D, BK, EVEN, DENSE
        )


@triton.jit
def finished(z_RK, x, mean, sigma, p_mu, k_K, K: tl.constexpr):
    """Return P (x - mean) from the results of `projection`, summed over all columns."""
    if x.dtype.element_ty != tl.float32:
        z_RK *= tl.load(sigma + k_K, mask=k_K < K, other=0.0)[None, :]
        if mean is not None:
            z_RK -= tl.load(p_mu + k_K, mask=k_K < K, other=0.0)[None, :]
    return z_RK


@triton.jit
def put_comparison(
    z_s_RK, z_t_RK, loss, saved, partial, i_R, in_range_R, k_K, m, weight_R, program, RANK, DZ_K,
    SCALES, KIND: tl.constexpr, EACH: tl.constexpr, HALF_DZ: tl.constexpr,
):  # fmt: skip
    """Compare projected rows, and store their sums and dz. Masked rows may hold anything."""
    live_R = weight_R != 0
    z_s_RK = tl.where(live_R[:, None], z_s_RK, 0.0)
    z_t_RK = tl.where(live_R[:, None], z_t_RK, 0.0)
    loss_R, inv_s_R, inv_t_R, omc_R = pair_stats(z_s_RK, z_t_RK, RANK, KIND)
    leave_sums(partial, program, weight_R, loss_R, inv_s_R, inv_t_R, omc_R)
    if EACH:
        tl.store(loss + i_R, tl.where(live_R, loss_R * weight_R, 0.0), mask=in_range_R)
    factor_R = gradient_factor(inv_s_R, tl.where(live_R, 1.0, 0.0), RANK, KIND)
    dz_RK = pair_gradient(z_s_RK, z_t_RK, inv_s_R, inv_t_R, omc_R, factor_R, KIND)
    dz_RK = tl.where(live_R[:, None], dz_RK, 0.0)
    at_RK = i_R.to(tl.int64)[:, None] * DZ_K + k_K[None, :]
    mask_RK = in_range_R[:, None] & (k_K < DZ_K)[None, :]
    if HALF_DZ:
        scale_R, inverse_R = power_of_2(tl.max(magnitude(dz_RK), axis=1))
        tl.store(saved + SCALES + i_R, scale_R, mask=in_range_R)
        dz = (saved + SCALES + aligned_rows(m)).to(tl.pointer_type(tl.float16))
        half_RK, rest_RK = rounded(dz_RK * inverse_R[:, None], tl.float16)
        tl.store(dz + at_RK, half_RK, mask=mask_RK)
        rest = dz + rest_of_dz(m, DZ_K)
        tl.store(rest + at_RK, rest_RK.to(tl.float16), mask=mask_RK)
    else:
        tl.store(saved + SCALES + at_RK, dz_RK, mask=mask_RK)


@triton.jit
def load_targets(teacher, row_R, last, k_K, live_R, RANK):
    """Load rows (R, K) of a teacher that is already projected."""
    at_RK = teacher + row_R[:, None] + k_K.to(tl.int64)[None, :] * last
    return tl.load(at_RK, mask=live_R[:, None] & (k_K < RANK)[None, :], other=0.0).to(tl.float32)


@launched
def projected_forward(
    student, teacher, teacher_mean, loss, saved, work, rows, teacher_rows, weights, denominator, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, DZ_K: tl.constexpr,
    HAS_TEACHER_PROJ: tl.constexpr, HALF_DZ: tl.constexpr, PRODUCTS: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
    S_WIDTH: tl.constexpr, S_COLUMNS: tl.constexpr, T_WIDTH: tl.constexpr, T_COLUMNS: tl.constexpr,
    SCALES: tl.constexpr, S_TERMS: tl.constexpr, T_TERMS: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Compute loss, statistics and dz of R rows in one pass over student and teacher."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    live_R = weight_R != 0
    k_K = tl.arange(0, BK)
    # Masked rows read the first row, so that the loop does not depend on the mask.
    s_R = live_R.to(tl.int64) * row_starts(
        rows, i_R, in_range_R, s_inner, s_outer, s_stride, UNIT, FLAT
    )
    t_R = live_R.to(tl.int64) * row_starts(
        teacher_rows, i_R, in_range_R, t_inner, t_outer, t_stride, UNIT, FLAT
    )
    z_s_RK = projection(
        student, s_R, s_last, None, False, work + S_TERMS, 0, 0, S_WIDTH, S_WIDTH, S_COLUMNS, R, D,
        BK, K, S_WIDTH % D == 0, DENSE, PRODUCTS,
    )  # fmt: skip
    z_s_RK = finished(z_s_RK, student, None, saved + HEAD, None, k_K, K)
    if HAS_TEACHER_PROJ:
        z_t_RK = projection(
            teacher, t_R, t_last, teacher_mean, True, work + T_TERMS, 0, 0, T_WIDTH, T_WIDTH,
            T_COLUMNS, R, D, BK, K, T_WIDTH % D == 0, DENSE, PRODUCTS,
        )  # fmt: skip
        z_t_RK = finished(z_t_RK, teacher, teacher_mean, work, work + K, k_K, K)
    else:
        z_t_RK = load_targets(teacher, t_R, t_last, k_K, live_R, RANK)
    program, partial = tl.program_id(0), work + REST
    put_comparison(
        z_s_RK, z_t_RK, loss, saved, partial, i_R, in_range_R, k_K, m, weight_R, program, RANK,
        DZ_K, SCALES, KIND, EACH, HALF_DZ,
    )  # fmt: skip
    finish(
        loss, saved, partial, denominator, m, program, tl.num_programs(0), weights is not None,
        MEAN, EACH, N,
    )  # fmt: skip


@launched
def project(
    student, teacher, teacher_mean, saved, work, rows, teacher_rows, weights, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last, s_part, t_part, z_at,
    z_rows,
    R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr,
    PRODUCTS: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
    S_WIDTH: tl.constexpr, S_COLUMNS: tl.constexpr, T_WIDTH: tl.constexpr, T_COLUMNS: tl.constexpr,
    S_TERMS: tl.constexpr, T_TERMS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Compute z[side, part] (z_rows, BLOCKS * BK) of one side over a part of its columns.

    A part has s_part * D columns of the student or t_part * D of the teacher. z is stored in whole
    blocks.

    Programs: (blocks of ranks x blocks of rows, parts, sides). Ranks vary first, so that the states
    of a block of rows are read once. SIDE is 0 (student) or 1 (teacher), or BOTH, which requires
    states of one dtype.
    """
    first_row = tl.program_id(0) // BLOCKS * R
    k0 = tl.program_id(0) % BLOCKS * BK
    part = tl.program_id(1)
    i_R = first_row + tl.arange(0, R)
    in_range_R = i_R < m
    live_R = (row_weights(weights, i_R, in_range_R) != 0).to(tl.int64)
    s_R = row_starts(rows, i_R, in_range_R, s_inner, s_outer, s_stride, UNIT, FLAT)
    t_R = row_starts(teacher_rows, i_R, in_range_R, t_inner, t_outer, t_stride, UNIT, FLAT)
    if SIDE == BOTH:
        side = tl.program_id(2)
        x = tl.where(side == 0, student, teacher)
        x_R = s_R + side * (t_R - s_R)  # arithmetic keeps the alignment visible to the compiler
        last = tl.where(side == 0, s_last, t_last)
        length = tl.where(side == 0, s_part, t_part) * D
    elif SIDE == 0:
        side = 0
        x = student
        x_R = s_R
        last = s_last
        length = s_part * D
    else:
        side = 1
        x = teacher
        x_R = t_R
        last = t_last
        length = t_part * D
    width = S_WIDTH + side * (T_WIDTH - S_WIDTH)
    columns = S_COLUMNS + side * (T_COLUMNS - S_COLUMNS)
    terms = work + (S_TERMS + side * (T_TERMS - S_TERMS))
    even: tl.constexpr = S_WIDTH % D == 0 and T_WIDTH % D == 0
    begin = part * length
    z_RK = projection(
        x, live_R * x_R, last, teacher_mean, side == 1, terms, k0, begin,
        tl.minimum(begin + length, width), width, columns, R, D, BK, K, even, DENSE, PRODUCTS,
    )  # fmt: skip
    z = work + z_at.to(tl.int64) * ALIGN
    z += ((side * tl.num_programs(1) + part) * z_rows.to(tl.int64) + first_row) * (BLOCKS * BK)
    at_RK = z + tl.arange(0, R)[:, None] * (BLOCKS * BK) + (k0 + tl.arange(0, BK))[None, :]
    tl.store(at_RK, z_RK)


@triton.jit
def sum_parts(z, parts, i_R, live_R, k_K, z_rows, K):
    """Return z[0] + z[1] + .. (R, K), added in order."""
    z_RK = tl.zeros((i_R.shape[0], k_K.shape[0]), tl.float32)
    mask_RK = live_R[:, None] & (k_K < K)[None, :]
    for part in range(parts):
        at_RK = (part * z_rows.to(tl.int64) + i_R)[:, None] * K + k_K[None, :]
        z_RK += tl.load(z + at_RK, mask=mask_RK, other=0.0)
    return z_RK


@launched
def compare(
    work, student, teacher, teacher_mean, loss, saved, teacher_rows, weights, denominator,
    z_at, z_rows, parts, m,
    t_inner, t_outer, t_stride, t_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, DZ_K: tl.constexpr, PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr, HAS_TEACHER_PROJ: tl.constexpr, HALF_DZ: tl.constexpr,
    UNIT: tl.constexpr, FLAT: tl.constexpr, SCALES: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Compute loss, statistics and dz from the z of `project`, which has K ranks.

    PADDED_K is the number of ranks of the operands. BLOCK is K rounded up to a power of two.
    """
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    live_R = weight_R != 0
    k_K = tl.arange(0, BLOCK)
    z, partial = work + z_at.to(tl.int64) * ALIGN, work + REST
    z_s_RK = sum_parts(z, parts, i_R, live_R, k_K, z_rows, K)
    z_s_RK = finished(z_s_RK, student, None, saved + HEAD, None, k_K, K)
    if HAS_TEACHER_PROJ:
        teacher_z = z + parts * z_rows.to(tl.int64) * K
        z_t_RK = sum_parts(teacher_z, parts, i_R, live_R, k_K, z_rows, K)
        z_t_RK = finished(z_t_RK, teacher, teacher_mean, work, work + PADDED_K, k_K, K)
    else:
        t_R = row_starts(teacher_rows, i_R, in_range_R, t_inner, t_outer, t_stride, UNIT, FLAT)
        z_t_RK = load_targets(teacher, t_R, t_last, k_K, live_R, RANK)
    program = tl.program_id(0)
    put_comparison(
        z_s_RK, z_t_RK, loss, saved, partial, i_R, in_range_R, k_K, m, weight_R, program, RANK,
        DZ_K, SCALES, KIND, EACH, HALF_DZ,
    )  # fmt: skip
    finish(
        loss, saved, partial, denominator, m, program, tl.num_programs(0), weights is not None,
        MEAN, EACH, N,
    )  # fmt: skip
