"""`identity.identity_forward` for rows that are too wide for registers.

A row is read again for every use, from L2, D elements at a time.
"""

import triton
import triton.language as tl

from oprd_kernels.backends.triton.identity import (
    add_piece,
    gradient_piece,
    of_layer,
    put_row,
    reduction_factor,
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
def load_columns(row, last, d_D, live, WIDTH: tl.constexpr, DENSE: tl.constexpr):
    """Load columns d of a row as float32."""
    at_D = row + (d_D if DENSE else d_D.to(tl.int64) * last)
    return tl.load(at_D, mask=live & (d_D < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def wide_squares(row, last, factor, live, WIDTH: tl.constexpr, D: tl.constexpr,
                 DENSE: tl.constexpr):  # fmt: skip
    """Return the sum of (factor * x)^2 over a row."""
    sum_D = tl.zeros((D,), tl.float32)
    for begin in range(0, WIDTH, D):
        x_D = load_columns(row, last, begin + tl.arange(0, D), live, WIDTH, DENSE) * factor
        sum_D = tl.fma(x_D, x_D, sum_D)
    return tl.sum(sum_D, axis=0)


@launched
def identity_forward_wide(
    students, teachers, grad, loss, saved, rows, teacher_rows, weights, denominator, saved_size, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last,
    g_inner, g_outer, g_stride, g_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute `identity.identity_forward` with the same parameters; N is not used."""
    i = tl.program_id(0)
    saved = layer_saved(saved, saved_size)
    weight = tl.full((), 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + i)
    live = weight != 0
    s_row = of_layer(students) + row_starts(rows, i, True, s_inner, s_outer, s_stride, UNIT, FLAT)
    t_row = of_layer(teachers) + row_starts(
        teacher_rows, i, True, t_inner, t_outer, t_stride, UNIT, FLAT
    )
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
        d_D = begin + tl.arange(0, D)
        s_D = load_columns(s_row, s_last, d_D, live, WIDTH, DENSE)
        t_D = load_columns(t_row, t_last, d_D, live, WIDTH, DENSE)
        distance_D, radial_D = add_piece(s_D, t_D, inv_s, inv_t, distance_D, radial_D, KIND)
    row_loss = mean_over(tl.sum(distance_D, axis=0), WIDTH, KIND)
    one_minus_cos = tl.where(zero, 1.0, tl.sum(radial_D, axis=0))
    inv_s = tl.where(zero, 0.0, inv_s)
    put_row(loss, saved, i, m, weight, row_loss, inv_s, inv_t, one_minus_cos, EACH)
    if grad is not None:
        coefficient = reduction_factor(saved, denominator, weights, m, MEAN) * weight
        factor = gradient_factor(inv_s, coefficient, WIDTH, KIND)
        g_row = grad + row_starts(None, i, True, g_inner, g_outer, g_stride, UNIT, FLAT)
        for begin in range(0, WIDTH, D):
            d_D = begin + tl.arange(0, D)
            s_D = load_columns(s_row, s_last, d_D, live, WIDTH, DENSE)
            t_D = load_columns(t_row, t_last, d_D, live, WIDTH, DENSE)
            g_D = gradient_piece(s_D, t_D, inv_s, inv_t, one_minus_cos, factor, KIND)
            g_D = tl.where(coefficient != 0, g_D, 0.0)
            at_D = g_row + (d_D if DENSE else d_D.to(tl.int64) * g_last)
            tl.store(at_D, g_D.to(grad.dtype.element_ty), mask=d_D < WIDTH)
