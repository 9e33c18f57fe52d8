"""`identity.identity_forward` for rows that are too wide for registers.

A row is read again for every use, from L2, D elements at a time.
"""

import triton
import triton.language as tl

from oprd_kernels.backends.triton.identity import (
    add_piece,
    columns,
    gradient_piece,
    layer_row,
    put_row,
    reduction_factor,
    weight_of,
)
from oprd_kernels.backends.triton.pair import (
    SHRINK,
    gradient_factor,
    inverse_norm,
    launched,
    mean_over,
    row_starts,
)
from oprd_kernels.backends.triton.saved import layer_saved


@triton.jit
def load_columns(row, last, begin, live, WIDTH: tl.constexpr, D: tl.constexpr,
                 DENSE: tl.constexpr):  # fmt: skip
    """Load D columns of a row as float32: 0 past its end, and 0 everywhere unless ``live``."""
    d_D, at_D = columns(row, last, begin, D, DENSE)
    return tl.load(at_D, mask=live & (d_D < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def wide_squares(row, last, factor, live, WIDTH: tl.constexpr, D: tl.constexpr,
                 DENSE: tl.constexpr):  # fmt: skip
    """Return the sum of (factor * x)^2 over a row."""
    sum_D = tl.zeros((D,), tl.float32)
    for begin in range(0, WIDTH, D):
        x_D = load_columns(row, last, begin, live, WIDTH, D, DENSE) * factor
        sum_D = tl.fma(x_D, x_D, sum_D)
    return tl.sum(sum_D, axis=0)


@triton.jit
def wide_stats(s_row, s_last, t_row, t_last, live, WIDTH: tl.constexpr, D: tl.constexpr,
               DENSE: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Return `identity.row_stats` of rows in memory."""
    s_squares = wide_squares(s_row, s_last, 1.0, live, WIDTH, D, DENSE)
    t_squares = wide_squares(t_row, t_last, 1.0, live, WIDTH, D, DENSE)
    s_factor = tl.where(s_squares == float("inf"), SHRINK, 1.0)
    t_factor = tl.where(t_squares == float("inf"), SHRINK, 1.0)
    if tl.minimum(s_factor, t_factor) < 1.0:
        s_squares = wide_squares(s_row, s_last, s_factor, live, WIDTH, D, DENSE)
        t_squares = wide_squares(t_row, t_last, t_factor, live, WIDTH, D, DENSE)
    inv_s, zero = inverse_norm(s_squares, s_factor)
    inv_t, _ = inverse_norm(t_squares, t_factor)
    distance_D = tl.zeros((D,), tl.float32)
    radial_D = tl.zeros((D,), tl.float32)
    for begin in range(0, WIDTH, D):
        s_D = load_columns(s_row, s_last, begin, live, WIDTH, D, DENSE)
        t_D = load_columns(t_row, t_last, begin, live, WIDTH, D, DENSE)
        distance_D, radial_D = add_piece(s_D, t_D, inv_s, inv_t, distance_D, radial_D, KIND)
    loss = mean_over(tl.sum(distance_D, axis=0), WIDTH, KIND)
    # A student row of norm 0 has no direction: its cosine and its gradient are 0.
    one_minus_cos = tl.where(zero, 1.0, tl.sum(radial_D, axis=0))
    return loss, tl.where(zero, 0.0, inv_s), inv_t, one_minus_cos


@launched
def identity_forward_wide(
    students, teachers, grad, loss, saved, rows, teacher_rows, weights, denominator, saved_size, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last,
    g_inner, g_outer, g_stride, g_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute `identity.identity_forward` with the same parameters, except N."""
    i = tl.program_id(0)
    saved = layer_saved(saved, saved_size)
    weight = weight_of(weights, i)
    live = weight != 0
    s_row = layer_row(students, rows, i, s_inner, s_outer, s_stride, UNIT, FLAT)
    t_row = layer_row(teachers, teacher_rows, i, t_inner, t_outer, t_stride, UNIT, FLAT)
    row_loss, inv_s, inv_t, one_minus_cos = wide_stats(
        s_row, s_last, t_row, t_last, live, WIDTH, D, DENSE, KIND
    )
    put_row(loss, saved, i, m, weight, row_loss, inv_s, inv_t, one_minus_cos, EACH)
    if grad is not None:
        coefficient = reduction_factor(saved, denominator, weights, m, MEAN) * weight
        factor = gradient_factor(inv_s, coefficient, WIDTH, KIND)
        g_row = grad + row_starts(None, i, True, g_inner, g_outer, g_stride, UNIT, FLAT)
        for begin in range(0, WIDTH, D):
            s_D = load_columns(s_row, s_last, begin, live, WIDTH, D, DENSE)
            t_D = load_columns(t_row, t_last, begin, live, WIDTH, D, DENSE)
            g_D = gradient_piece(s_D, t_D, inv_s, inv_t, one_minus_cos, factor, KIND)
            g_D = tl.where(coefficient != 0, g_D, 0.0)
            d_D, at_D = columns(g_row, g_last, begin, D, DENSE)
            tl.store(at_D, g_D.to(grad.dtype.element_ty), mask=d_D < WIDTH)
