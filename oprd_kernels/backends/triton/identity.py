"""Kernels without a projection: statistics, and the gradient in forward or in backward.

A program keeps one row of both tensors in registers between uses, as N pieces of D elements. Global
memory is thus read once. One warp holds a row of up to 2,048 16-bit elements, without a barrier.
`identity_wide` handles rows that are too wide for registers.

Tensors are passed as tuples with one tensor per layer, all of the same shape and strides.
program_id(1) is the layer.
"""

import triton
import triton.language as tl

from oprd_kernels.backends.triton.pair import (
    MSE,
    SHRINK,
    gradient_factor,
    inverse,
    inverse_norm,
    launched,
    mean_over,
    row_starts,
)
from oprd_kernels.backends.triton.saved import HEAD, SCALE, aligned_rows, layer_saved, ticket_of


@triton.jit
def of_layer(tensors):
    """Return the tensor of layer program_id(1)."""
    layer = tl.program_id(1)
    at = tensors[0]
    for n in tl.static_range(1, len(tensors)):
        at = tl.where(layer == n, tensors[n], at)
    return at


@triton.jit
def layer_row(tensors, index, i, inner, outer, stride, UNIT: tl.constexpr, FLAT: tl.constexpr):
    """Return a pointer to row i, or to row index[i], of layer program_id(1)."""
    return of_layer(tensors) + row_starts(index, i, True, inner, outer, stride, UNIT, FLAT)


@triton.jit
def weight_of(weights, i):
    """Return the weight of row i, or 1 without ``weights``."""
    if weights is None:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.load(weights + i)


@triton.jit
def columns(row, last, begin, D: tl.constexpr, DENSE: tl.constexpr):
    """Return the indices of D columns from ``begin`` on, and pointers to them in a row."""
    d_D = begin + tl.arange(0, D)
    return d_D, row + (d_D if DENSE else d_D.to(tl.int64) * last)


@triton.jit
def load_row(row, last, live, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
             DENSE: tl.constexpr):  # fmt: skip
    """Load N pieces of a row: 0 past its end, and 0 everywhere unless ``live``."""
    pieces = ()
    for n in tl.static_range(N):
        d_D, at_D = columns(row, last, n * D, D, DENSE)
        if (n + 1) * D > WIDTH:
            pieces += (tl.load(at_D, mask=live & (d_D < WIDTH), other=0.0),)  # type: ignore[assignment]
        else:
            pieces += (tl.load(at_D, mask=live, other=0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit
def store_piece(row, last, n, piece_D, live, WIDTH: tl.constexpr, D: tl.constexpr,
                DENSE: tl.constexpr):  # fmt: skip
    """Store piece n of a row, rounded to the row's dtype, if ``live``."""
    d_D, at_D = columns(row, last, n * D, D, DENSE)
    value_D = piece_D.to(row.dtype.element_ty)
    if (n + 1) * D > WIDTH:
        tl.store(at_D, value_D, mask=live & (d_D < WIDTH))
    else:
        tl.store(at_D, value_D, mask=live)


@triton.jit
def row_squares(pieces, factor, D: tl.constexpr, N: tl.constexpr):
    """Return the sum of (factor * x)^2."""
    sum_D = tl.zeros((D,), tl.float32)
    for n in tl.static_range(N):
        x_D = pieces[n].to(tl.float32) * factor
        sum_D = tl.fma(x_D, x_D, sum_D)
    return tl.sum(sum_D, axis=0)


@triton.jit
def add_piece(s_D, t_D, inv_s, inv_t, distance_D, radial_D, KIND: tl.constexpr):
    """Add a piece of a row to the squared distance and to s^ . (s^ - t^)."""
    unit_D = s_D * inv_s
    e_D = unit_D - t_D * inv_t
    radial_D = tl.fma(unit_D, e_D, radial_D)
    if KIND == MSE:
        e_D = s_D - t_D
    return tl.fma(e_D, e_D, distance_D), radial_D


@triton.jit
def row_stats(s, t, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr):
    """Return the loss, 1 / |s| (0 for a row of norm 0), 1 / |t| and 1 - cos."""
    s_squares, t_squares = row_squares(s, 1.0, D, N), row_squares(t, 1.0, D, N)
    s_factor = tl.where(s_squares == float("inf"), SHRINK, 1.0)
    t_factor = tl.where(t_squares == float("inf"), SHRINK, 1.0)
    if tl.minimum(s_factor, t_factor) < 1.0:
        s_squares, t_squares = row_squares(s, s_factor, D, N), row_squares(t, t_factor, D, N)
    inv_s, zero = inverse_norm(s_squares, s_factor)
    inv_t, _ = inverse_norm(t_squares, t_factor)
    distance_D = tl.zeros((D,), tl.float32)
    radial_D = tl.zeros((D,), tl.float32)
    for n in tl.static_range(N):
        distance_D, radial_D = add_piece(
            s[n].to(tl.float32), t[n].to(tl.float32), inv_s, inv_t, distance_D, radial_D, KIND
        )
    loss = mean_over(tl.sum(distance_D, axis=0), WIDTH, KIND)
    # A student row of norm 0 has no direction: its cosine and its gradient are 0.
    one_minus_cos = tl.where(zero, 1.0, tl.sum(radial_D, axis=0))
    return loss, tl.where(zero, 0.0, inv_s), inv_t, one_minus_cos


@triton.jit
def gradient_piece(s_D, t_D, inv_s, inv_t, one_minus_cos, factor, KIND: tl.constexpr):
    """Return `pair.pair_gradient` of a piece of one row."""
    s_D, t_D = s_D.to(tl.float32), t_D.to(tl.float32)
    if KIND == MSE:
        return (s_D - t_D) * factor
    else:
        unit_D = s_D * inv_s
        e_D = unit_D - t_D * inv_t
        return tl.fma(-one_minus_cos, unit_D, e_D) * factor


@triton.jit
def put_row(loss, saved, i, m, weight, row_loss, inv_s, inv_t, one_minus_cos, EACH: tl.constexpr):
    """Store the results of a row, or zeros for a masked row.

    With EACH, the weighted row losses are the final result. The first program also resets the
    ticket for the reduction that follows.
    """
    live = weight != 0
    size = aligned_rows(m)
    row = saved + HEAD + i
    tl.store(row, tl.where(live, inv_s, 0.0))
    tl.store(row + size, tl.where(live, inv_t, 0.0))
    tl.store(row + 2 * size, tl.where(live, one_minus_cos, 0.0))
    if EACH:
        tl.store(loss + i, tl.where(live, row_loss * weight, 0.0))
    else:
        tl.store(row + 3 * size, tl.where(live, row_loss, 0.0))
    if i == 0:
        tl.store(ticket_of(saved), 0)


@triton.jit
def reduction_factor(saved, denominator, weights, m, MEAN: tl.constexpr):
    """Return the factor by which the reduction multiplies each row.

    If the factor depends on the sum of the weights, an earlier launch has stored it in ``saved``.
    """
    if not MEAN:
        return tl.full((), 1.0, tl.float32)
    elif denominator is not None:
        return inverse(tl.load(denominator))
    elif weights is not None:
        return tl.load(saved + SCALE)
    else:
        return inverse(m.to(tl.float32))


@launched
def identity_forward(
    students, teachers, grad, loss, saved, rows, teacher_rows, weights, denominator, saved_size, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last,
    g_inner, g_outer, g_stride, g_last,
    KIND: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Compute the statistics and losses of rows.

    With ``grad``, also compute the gradient of the reduced loss. ``grad`` requires a single layer,
    and may be the memory of the teacher.
    """
    i = tl.program_id(0)
    saved = layer_saved(saved, saved_size)
    weight = weight_of(weights, i)
    live = weight != 0
    s_row = layer_row(students, rows, i, s_inner, s_outer, s_stride, UNIT, FLAT)
    t_row = layer_row(teachers, teacher_rows, i, t_inner, t_outer, t_stride, UNIT, FLAT)
    s = load_row(s_row, s_last, live, WIDTH, D, N, DENSE)
    t = load_row(t_row, t_last, live, WIDTH, D, N, DENSE)
    row_loss, inv_s, inv_t, one_minus_cos = row_stats(s, t, WIDTH, D, N, KIND)
    put_row(loss, saved, i, m, weight, row_loss, inv_s, inv_t, one_minus_cos, EACH)
    if grad is not None:
        coefficient = reduction_factor(saved, denominator, weights, m, MEAN) * weight
        factor = gradient_factor(inv_s, coefficient, WIDTH, KIND)
        g_row = grad + row_starts(None, i, True, g_inner, g_outer, g_stride, UNIT, FLAT)
        for n in tl.static_range(N):
            g_D = gradient_piece(s[n], t[n], inv_s, inv_t, one_minus_cos, factor, KIND)
            g_D = tl.where(coefficient != 0, g_D, 0.0)
            store_piece(g_row, g_last, n, g_D, True, WIDTH, D, DENSE)


@launched
def identity_backward(
    grads, students, teachers, saved, grad_loss, rows, teacher_rows, weights, grad_loss_row,
    grad_loss_layer, m,
    s_inner, s_outer, s_stride, s_last, t_inner, t_outer, t_stride, t_last,
    g_inner, g_outer, g_stride, g_last,
    KIND: tl.constexpr, ACCUMULATE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Write the gradient to the supervised rows of ``grads``, or add it with ACCUMULATE.

    program_id(2) selects N pieces of a row.
    """
    i = tl.program_id(0)
    saved = of_layer(saved)
    weight = weight_of(weights, i)
    live = weight != 0
    begin = tl.program_id(2) * (N * D)
    s_row = layer_row(students, rows, i, s_inner, s_outer, s_stride, UNIT, FLAT)
    t_row = layer_row(teachers, teacher_rows, i, t_inner, t_outer, t_stride, UNIT, FLAT)
    g_row = layer_row(grads, rows, i, g_inner, g_outer, g_stride, UNIT, FLAT)
    s = load_part(s_row, s_last, begin, live, WIDTH, D, N, DENSE)
    t = load_part(t_row, t_last, begin, live, WIDTH, D, N, DENSE)
    if ACCUMULATE:
        old = load_part(g_row, g_last, begin, live, WIDTH, D, N, DENSE)
    scale = tl.load(saved + SCALE)
    size = aligned_rows(m)
    row = saved + HEAD + i
    inv_s, inv_t, one_minus_cos = tl.load(row), tl.load(row + size), tl.load(row + 2 * size)
    upstream = tl.load(
        grad_loss + i.to(tl.int64) * grad_loss_row + tl.program_id(1) * grad_loss_layer
    )
    active = live & (scale != 0)
    factor = gradient_factor(inv_s, upstream * scale * weight, WIDTH, KIND)
    for n in tl.static_range(N):
        g_D = gradient_piece(s[n], t[n], inv_s, inv_t, one_minus_cos, factor, KIND)
        if ACCUMULATE:
            g_D = old[n].to(tl.float32) + g_D
            store_part(g_row, g_last, begin, n, g_D, active, WIDTH, D, N, DENSE)
        else:
            g_D = tl.where(active, g_D, 0.0)
            store_part(g_row, g_last, begin, n, g_D, True, WIDTH, D, N, DENSE)


@triton.jit
def load_part(row, last, begin, live, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
              DENSE: tl.constexpr):  # fmt: skip
    """Call `load_row`, or load N pieces from column ``begin`` if programs share the row."""
    if WIDTH <= N * D:
        return load_row(row, last, live, WIDTH, D, N, DENSE)
    else:
        pieces = ()
        for n in tl.static_range(N):
            d_D, at_D = columns(row, last, begin + n * D, D, DENSE)
            pieces += (tl.load(at_D, mask=live & (d_D < WIDTH), other=0.0),)  # type: ignore[assignment]
        return pieces


@triton.jit
def store_part(row, last, begin, n, piece_D, live, WIDTH: tl.constexpr, D: tl.constexpr,
               N: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """Call `store_piece`, or store piece n after column ``begin`` if programs share the row."""
    if WIDTH <= N * D:
        store_piece(row, last, n, piece_D, live, WIDTH, D, DENSE)
    else:
        d_D, at_D = columns(row, last, begin + n * D, D, DENSE)
        tl.store(at_D, piece_D.to(row.dtype.element_ty), mask=live & (d_D < WIDTH))
