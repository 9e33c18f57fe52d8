"""Rows compared after a projection: z = P h in one pass over the hidden states, and dh = P' dz.

Products are exact to float32 in either of two ways, chosen by the type in which P arrives:

- float32: plain FMA (`tl.dot`, "ieee");
- bfloat16: P as the three terms that a float32 consists of (`split_terms`), on tensor cores. A
  bfloat16 h is exact as it is: three products. Any other operand is split too: the six products
  that are not below float32's last place.

Shapes: R rows of a program, D columns at a time, K ranks (r padded to a power of two).
"""

import triton
import triton.language as tl

from oprd_kernels.triton_backend.pair import (
    SCALE,
    load_block,
    pair_gradient,
    pair_stats,
    put_stats,
    row_offsets,
    row_weights,
)


@triton.jit
def terms_of(x):
    """x as the sum of three bfloat16: its upper, middle and lower bits."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def split_terms(proj, terms, n, B: tl.constexpr):
    """terms (3, n) bfloat16 of proj (n,) float32: once a call, as every block of rows needs it."""
    i_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    high_B, middle_B, low_B = terms_of(tl.load(proj + i_B, mask=i_B < n, other=0.0))
    tl.store(terms + i_B, high_B, mask=i_B < n)
    tl.store(terms + n + i_B, middle_B, mask=i_B < n)
    tl.store(terms + 2 * n + i_B, low_B, mask=i_B < n)


@triton.jit
def add_product(a, b, c, INTERPRETED: tl.constexpr):
    """a b + c of bfloat16 a and b. INTERPRETED: Triton's interpreter multiplies their bits as if
    they were integers, so they are widened there, which changes nothing in their values."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def add_exact_product(a, b_high, b_middle, b_low, c, INTERPRETED: tl.constexpr):
    """a b + c as exact as in float32, for b in three terms; small products first."""
    if a.dtype == tl.bfloat16:
        c = add_product(a, b_low, c, INTERPRETED)
        c = add_product(a, b_middle, c, INTERPRETED)
        return add_product(a, b_high, c, INTERPRETED)
    else:
        a_high, a_middle, a_low = terms_of(a.to(tl.float32))
        c = add_product(a_low, b_high, c, INTERPRETED)
        c = add_product(a_middle, b_middle, c, INTERPRETED)
        c = add_product(a_high, b_low, c, INTERPRETED)
        c = add_product(a_middle, b_high, c, INTERPRETED)
        c = add_product(a_high, b_middle, c, INTERPRETED)
        return add_product(a_high, b_high, c, INTERPRETED)


@triton.jit
def projection(
    x, row_R, stride_last, valid_R, proj, mean, k_K, rank, width, begin, end,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(R, K) P (x - mean) over columns from begin, a multiple of D, up to end or the width."""
    z_RK = tl.zeros((R, K), tl.float32)
    for first in range(begin, end, D):
        d_D = first + tl.arange(0, D)
        inside_D = d_D < width
        at_RD = x + row_R[:, None] + d_D[None, :] * stride_last
        h_RD = tl.load(at_RD, mask=valid_R[:, None] & inside_D[None, :], other=0.0)
        if mean is not None:  # before the product: after it, z would be a difference of large sums
            mean_D = tl.load(mean + d_D, mask=inside_D, other=0.0)
            h_RD = h_RD.to(tl.float32) - mean_D[None, :]
        at_DK = proj + k_K[None, :].to(tl.int64) * width + d_D[:, None]
        mask_DK = inside_D[:, None] & (k_K < rank)[None, :]
        p_DK = tl.load(at_DK, mask=mask_DK, other=0.0)
        if proj.dtype.element_ty == tl.bfloat16:
            middle_DK = tl.load(at_DK + rank * width, mask=mask_DK, other=0.0)
            low_DK = tl.load(at_DK + 2 * rank * width, mask=mask_DK, other=0.0)
            z_RK = add_exact_product(h_RD, p_DK, middle_DK, low_DK, z_RK, INTERPRETED)
        else:
            z_RK = tl.dot(h_RD.to(tl.float32), p_DK, z_RK, input_precision="ieee")
    return z_RK


@triton.jit(do_not_specialize=["m", "dz_offset"])
def projected_forward(
    student, teacher, student_proj, teacher_proj, teacher_mean, loss, saved, rows, teacher_rows,
    weights, m, rank, student_width, teacher_width, dz_offset,
    student_inner, student_outer, student_stride, student_last,
    teacher_inner, teacher_outer, teacher_stride, teacher_last,
    KIND: tl.constexpr, EACH: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and dz of R rows in one pass over both; without ``teacher_proj`` the teacher
    is r wide already."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    valid_R = weight_R != 0
    k_K = tl.arange(0, K)
    s_R = row_offsets(rows, i_R, in_range_R, student_inner, student_outer, student_stride)
    t_R = row_offsets(teacher_rows, i_R, in_range_R, teacher_inner, teacher_outer, teacher_stride)
    z_s_RK = projection(
        student, s_R, student_last, valid_R, student_proj, None, k_K, rank, student_width,
        0, student_width, R, D, K, INTERPRETED,
    )  # fmt: skip
    if teacher_proj is None:
        mask_RK = valid_R[:, None] & (k_K < rank)[None, :]
        z_t_RK = load_block(teacher, t_R, k_K, teacher_last, mask_RK)
    else:
        z_t_RK = projection(
            teacher, t_R, teacher_last, valid_R, teacher_proj, teacher_mean, k_K, rank,
            teacher_width, 0, teacher_width, R, D, K, INTERPRETED,
        )  # fmt: skip
    put_comparison(
        z_s_RK, z_t_RK, loss, saved, dz_offset, i_R, in_range_R, k_K, m, rank, weight_R, KIND, EACH
    )


@triton.jit
def put_comparison(
    z_s_RK, z_t_RK, loss, saved, dz_offset, i_R, in_range_R, k_K, m, rank, weight_R,
    KIND: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Compare projected rows: store loss, statistics and dz."""
    loss_R, inv_s_R, inv_t_R, omc_R = pair_stats(z_s_RK, z_t_RK, rank, KIND)
    put_stats(loss, saved, i_R, in_range_R, m, weight_R, loss_R, inv_s_R, inv_t_R, omc_R, EACH)
    one_R = tl.where(in_range_R, 1.0, 0.0)
    dz_RK = pair_gradient(z_s_RK, z_t_RK, inv_s_R, inv_t_R, omc_R, one_R, rank, KIND)
    dz_RK = tl.where((weight_R != 0)[:, None], dz_RK, 0.0)
    dz_at = saved + dz_offset + i_R.to(tl.int64)[:, None] * rank + k_K[None, :]
    tl.store(dz_at, dz_RK, mask=in_range_R[:, None] & (k_K < rank)[None, :])


@triton.jit(do_not_specialize=["m"])
def project_part(
    x, proj, mean, z, index, weights, m, rank, width, part,
    inner, stride_outer, stride, stride_last,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """z[n] (M, r) of one side over columns [n * part, (n + 1) * part), n = program_id(1), and ranks
    from K * program_id(2) on: for few rows, which would leave most of the chip idle, and for ranks
    whose accumulators of both sides do not fit one program's registers."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    n = tl.program_id(1)
    k_K = tl.program_id(2) * K + tl.arange(0, K)
    valid_R = row_weights(weights, i_R, in_range_R) != 0
    row_R = row_offsets(index, i_R, in_range_R, inner, stride_outer, stride)
    z_RK = projection(
        x, row_R, stride_last, valid_R, proj, mean, k_K, rank, width, n * part, (n + 1) * part,
        R, D, K, INTERPRETED,
    )  # fmt: skip
    z_at = z + (n.to(tl.int64) * m + i_R)[:, None] * rank + k_K[None, :]
    tl.store(z_at, z_RK, mask=in_range_R[:, None] & (k_K < rank)[None, :])


@triton.jit
def sum_parts(z, parts, i_R, valid_R, k_K, m, rank, R: tl.constexpr, K: tl.constexpr):
    """(R, K) z[0] + z[1] + .., in order."""
    z_RK = tl.zeros((R, K), tl.float32)
    mask_RK = valid_R[:, None] & (k_K < rank)[None, :]
    for n in range(parts):
        at_RK = z + (n * m.to(tl.int64) + i_R)[:, None] * rank + k_K[None, :]
        z_RK += tl.load(at_RK, mask=mask_RK, other=0.0)
    return z_RK


@triton.jit(do_not_specialize=["m", "dz_offset", "parts_s", "parts_t"])
def compare_parts(
    z_s, z_t, parts_s, parts_t, teacher, loss, saved, teacher_rows, weights, m, rank, dz_offset,
    teacher_inner, teacher_outer, teacher_stride, teacher_last,
    KIND: tl.constexpr, EACH: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and dz from what `project_part` has left; without ``z_t`` from a teacher
    that is r wide already."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    valid_R = weight_R != 0
    k_K = tl.arange(0, K)
    z_s_RK = sum_parts(z_s, parts_s, i_R, valid_R, k_K, m, rank, R, K)
    if z_t is None:
        t_R = row_offsets(
            teacher_rows, i_R, in_range_R, teacher_inner, teacher_outer, teacher_stride
        )
        mask_RK = valid_R[:, None] & (k_K < rank)[None, :]
        z_t_RK = load_block(teacher, t_R, k_K, teacher_last, mask_RK)
    else:
        z_t_RK = sum_parts(z_t, parts_t, i_R, valid_R, k_K, m, rank, R, K)
    put_comparison(
        z_s_RK, z_t_RK, loss, saved, dz_offset, i_R, in_range_R, k_K, m, rank, weight_R, KIND, EACH
    )


@triton.jit(do_not_specialize=["m", "dz_offset"])
def projected_backward(
    grad, student_proj, saved, dz_offset, grad_loss, grad_loss_stride, rows, weights, m, rank,
    width, grad_inner, grad_outer, grad_stride, grad_last,
    ACCUMULATE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write, or ACCUMULATE, (g dz) P in the supervised rows of ``grad``: R rows, D columns, K ranks
    at a time."""
    i_R = tl.program_id(0) * R + tl.arange(0, R)
    in_range_R = i_R < m
    weight_R = row_weights(weights, i_R, in_range_R)
    scale = tl.load(saved + SCALE)
    active_R = tl.where(scale == 0, 0.0, weight_R) != 0
    upstream_at = grad_loss + i_R.to(tl.int64) * grad_loss_stride
    upstream_R = tl.load(upstream_at, mask=active_R, other=0.0)
    coefficient_R = upstream_R * scale * weight_R
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    inside_D = d_D < width
    g_RD = tl.zeros((R, D), tl.float32)
    for first in range(0, rank, K):
        k_K = first + tl.arange(0, K)
        inside_K = k_K < rank
        dz_at = saved + dz_offset + i_R.to(tl.int64)[:, None] * rank + k_K[None, :]
        dz_RK = tl.load(dz_at, mask=active_R[:, None] & inside_K[None, :], other=0.0)
        dz_RK = dz_RK * coefficient_R[:, None]
        at_KD = student_proj + k_K[:, None].to(tl.int64) * width + d_D[None, :]
        mask_KD = inside_K[:, None] & inside_D[None, :]
        p_KD = tl.load(at_KD, mask=mask_KD, other=0.0)
        if student_proj.dtype.element_ty == tl.bfloat16:
            middle_KD = tl.load(at_KD + rank * width, mask=mask_KD, other=0.0)
            low_KD = tl.load(at_KD + 2 * rank * width, mask=mask_KD, other=0.0)
            # All six for 16-bit gradients too: the sum over ranks may cancel.
            g_RD = add_exact_product(dz_RK, p_KD, middle_KD, low_KD, g_RD, INTERPRETED)
        else:
            g_RD = tl.dot(dz_RK, p_KD, g_RD, input_precision="ieee")
    g_R = row_offsets(rows, i_R, in_range_R, grad_inner, grad_outer, grad_stride)
    g_at = grad + g_R[:, None] + d_D[None, :] * grad_last
    if ACCUMULATE:
        mask_RD = active_R[:, None] & inside_D[None, :]
        g_RD += tl.load(g_at, mask=mask_RD, other=0.0).to(tl.float32)
    else:
        mask_RD = in_range_R[:, None] & inside_D[None, :]
        g_RD = tl.where(active_R[:, None], g_RD, 0.0)
    tl.store(g_at, g_RD.to(grad.dtype.element_ty), mask=mask_RD)
