"""Functions that all kernels share: the positions of rows, and the loss of pairs of rows in
registers.

The formulas are those of csrc/cpu/pair.h. Shapes: R rows of a program and K columns, both padded
with zeros.

Kernels are compiled with ``enable_fp_fusion=False``. With contraction, ``a * x - b * y`` would not
be 0 for equal products, and the gradient of equal rows would not be 0. Where a fused multiply-add
is safe, kernels use `tl.fma`.
"""

import triton
import triton.language as tl

MSE = tl.constexpr(0)
NMSE = tl.constexpr(1)
COSINE = tl.constexpr(2)
EPS = tl.constexpr(1e-12)
SHRINK = tl.constexpr(2.0**-80)
"""The scale of rows whose squares overflow float32. Scaling by it is exact, and elements that it
flushes to zero are below the last place of the sum."""

launched = triton.jit(
    do_not_specialize=[
        *(
            "rank",
            "m",
            "saved_size",
            "chunk",
            "part",
            "s_part",
            "t_part",
            "parts",
            "z_at",
            "z_rows",
        ),
        *("grad_loss_row", "grad_loss_layer"),
        *(f"{x}_{n}" for x in "stg" for n in ("inner", "outer", "stride", "last")),
    ],
    do_not_specialize_on_alignment=[
        *("loss", "grad_loss", "rows", "teacher_rows", "weights", "denominator"),
    ],
)
"""The decorator of kernels that are launched (see `launch`). It keeps Triton from specialising them
on scalars, and on the alignment of vectors with one value per row."""


@triton.jit
def row_starts(
    index, i_R, in_range_R, inner, outer, stride, UNIT: tl.constexpr, FLAT: tl.constexpr
):
    """Return the offsets of rows in elements, in 64 bits because tensors may exceed 2^31 elements.

    Strides are in units of UNIT elements, so that the compiler knows the alignment of rows. With
    FLAT, one stride gives the position of every row, which saves two divisions per row.
    """
    n_R = i_R.to(tl.int64)
    if index is not None:
        n_R = tl.load(index + i_R, mask=in_range_R, other=0)
    if FLAT:
        return n_R * stride * UNIT
    else:
        return ((n_R // inner) * outer + (n_R % inner) * stride) * UNIT


@triton.jit
def row_weights(weights, i_R, in_range_R):
    """Return the weights of the rows, or 1 without ``weights``."""
    if weights is None:
        return tl.where(in_range_R, 1.0, 0.0)
    else:
        return tl.load(weights + i_R, mask=in_range_R, other=0.0)


@triton.jit
def inverse(divisor):
    """Return 1 / divisor, or 0 if ``divisor`` is 0."""
    return tl.where(divisor == 0, 0.0, tl.div_rn(1.0, tl.where(divisor == 0, 1.0, divisor)))


@triton.jit
def inverse_norm(squares, factor):
    """Return 1 / max(|x|, EPS), and whether |x| <= EPS, from the sum of (factor * x)^2."""
    norm = tl.sqrt_rn(squares)
    zero = norm <= EPS  # false for NaN, which stays NaN
    return tl.div_rn(factor, tl.where(zero, EPS, norm)), zero


@triton.jit
def mean_over(total, width, KIND: tl.constexpr):
    """Return the loss of a row from its sum of squared differences."""
    return tl.div_rn(total, tl.zeros_like(total) + (2 if KIND == COSINE else width))


@triton.jit
def gradient_factor(inv_s, coefficient, width, KIND: tl.constexpr):
    """Return the factor that turns s - t (mse), or the tangential part of s^ - t^ (other kinds),
    into the gradient."""
    one = tl.zeros_like(inv_s) + 1.0
    if KIND == MSE:
        return coefficient * tl.div_rn(2.0 * one, width * one)
    elif KIND == NMSE:
        return coefficient * inv_s * tl.div_rn(2.0 * one, width * one)
    else:
        return coefficient * inv_s


@triton.jit
def inverse_norms(x_RK):
    """Return 1 / max(|x|, EPS) (R,), and whether |x| <= EPS."""
    squares_R = tl.sum(x_RK * x_RK, axis=1)
    overflow_R = squares_R == float("inf")
    factor_R = tl.where(overflow_R, SHRINK, 1.0)
    if tl.max(overflow_R.to(tl.int32), axis=0) > 0:
        small_RK = x_RK * factor_R[:, None]
        squares_R = tl.sum(small_RK * small_RK, axis=1)
    return inverse_norm(squares_R, factor_R)


@triton.jit
def pair_stats(s_RK, t_RK, width, KIND: tl.constexpr):
    """Return the loss, 1 / |s|, 1 / |t| and 1 - cos, each (R,).

    1 - cos is computed as s^ . (s^ - t^), which avoids cancellation. It uses the same rounded s^ as
    the gradient, so that it removes the radial part of the gradient up to rounding.
    """
    inv_s_R, zero_R = inverse_norms(s_RK)
    inv_t_R, _ = inverse_norms(t_RK)
    unit_RK = s_RK * inv_s_R[:, None]
    e_RK = unit_RK - t_RK * inv_t_R[:, None]
    one_minus_cos_R = tl.sum(unit_RK * e_RK, axis=1)
    if KIND == MSE:
        e_RK = s_RK - t_RK
    loss_R = mean_over(tl.sum(e_RK * e_RK, axis=1), width, KIND)
    # A student row of norm 0 has no direction: its cosine and its gradient are 0.
    return loss_R, tl.where(zero_R, 0.0, inv_s_R), inv_t_R, tl.where(zero_R, 1.0, one_minus_cos_R)


@triton.jit
def pair_gradient(s_RK, t_RK, inv_s_R, inv_t_R, one_minus_cos_R, factor_R, KIND: tl.constexpr):
    """Return factor * (s - t) for mse, or factor * ((s^ - t^) - (1 - cos) s^) for other kinds."""
    if KIND == MSE:
        return (s_RK - t_RK) * factor_R[:, None]
    else:
        unit_RK = s_RK * inv_s_R[:, None]
        e_RK = unit_RK - t_RK * inv_t_R[:, None]
        return tl.fma(-one_minus_cos_R[:, None], unit_RK, e_RK) * factor_R[:, None]
