"""What the kernels share: where rows are, and the loss of pairs of rows held in registers.

The same formulas as csrc/cpu/pair.h. Shapes: R rows of a program, K columns; zeros pad both.
Compiled with ``enable_fp_fusion=False``: contracted, ``a * x - b * y`` is not 0 for equal products,
and the gradient of equal rows would not be 0. Where a fused multiply-add is safe, kernels ask for
it (`tl.fma`).
"""

import triton
import triton.language as tl

MSE = tl.constexpr(0)
NMSE = tl.constexpr(1)
COSINE = tl.constexpr(2)
EPS = tl.constexpr(1e-12)
SHRINK = tl.constexpr(2.0**-80)
"""For rows whose squares overflow float32: exact, and what it loses is below their last place."""

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
"""Decorator of the kernels that are launched (see `launch`): no scalar makes another kernel, nor
does the alignment of vectors that have one value a row."""


@triton.jit
def row_starts(
    index, i_R, in_range_R, inner, outer, stride, UNIT: tl.constexpr, FLAT: tl.constexpr
):
    """Where rows begin, in elements: 64 bits, as tensors may hold more than 2^31.

    Strides come in units of UNIT elements, so that the compiler knows how rows are aligned. FLAT:
    one stride says where every row is, which spares two divisions a row.
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
    """The rows' weights; 1 without ``weights``."""
    if weights is None:
        return tl.where(in_range_R, 1.0, 0.0)
    else:
        return tl.load(weights + i_R, mask=in_range_R, other=0.0)


@triton.jit
def inverse(divisor):
    """1 / divisor; 0 if that is 0."""
    return tl.where(divisor == 0, 0.0, tl.div_rn(1.0, tl.where(divisor == 0, 1.0, divisor)))


@triton.jit
def inverse_norm(squares, factor):
    """1 / max(|x|, EPS), and whether |x| <= EPS, from the sum of (factor * x)^2."""
    norm = tl.sqrt_rn(squares)
    zero = norm <= EPS  # false for NaN, which stays NaN
    return tl.div_rn(factor, tl.where(zero, EPS, norm)), zero


@triton.jit
def mean_over(total, width, KIND: tl.constexpr):
    """A row's loss from its sum of squared differences."""
    return tl.div_rn(total, tl.zeros_like(total) + (2 if KIND == COSINE else width))


@triton.jit
def gradient_factor(inv_s, coefficient, width, KIND: tl.constexpr):
    """What multiplies s - t (mse), or the tangential part of s^ - t^, to give the gradient."""
    one = tl.zeros_like(inv_s) + 1.0
    if KIND == MSE:
        return coefficient * tl.div_rn(2.0 * one, width * one)
    elif KIND == NMSE:
        return coefficient * inv_s * tl.div_rn(2.0 * one, width * one)
    else:
        return coefficient * inv_s


@triton.jit
def inverse_norms(x_RK):
    """(R,) 1 / max(|x|, EPS), and whether |x| <= EPS."""
    squares_R = tl.sum(x_RK * x_RK, axis=1)
    overflow_R = squares_R == float("inf")
    factor_R = tl.where(overflow_R, SHRINK, 1.0)
    if tl.max(overflow_R.to(tl.int32), axis=0) > 0:
        small_RK = x_RK * factor_R[:, None]
        squares_R = tl.sum(small_RK * small_RK, axis=1)
    return inverse_norm(squares_R, factor_R)


@triton.jit
def pair_stats(s_RK, t_RK, width, KIND: tl.constexpr):
    """(R,) loss, 1 / |s|, 1 / |t| and 1 - cos.

    1 - cos is measured as s^ . (s^ - t^): without cancellation, and with the very s^ that the
    gradient uses, whose radial part it removes to rounding.
    """
    inv_s_R, zero_R = inverse_norms(s_RK)
    inv_t_R, _ = inverse_norms(t_RK)
    unit_RK = s_RK * inv_s_R[:, None]
    e_RK = unit_RK - t_RK * inv_t_R[:, None]
    one_minus_cos_R = tl.sum(unit_RK * e_RK, axis=1)
    if KIND == MSE:
        e_RK = s_RK - t_RK
    loss_R = mean_over(tl.sum(e_RK * e_RK, axis=1), width, KIND)
    # A student row without a direction: cosine 0, gradient 0.
    return loss_R, tl.where(zero_R, 0.0, inv_s_R), inv_t_R, tl.where(zero_R, 1.0, one_minus_cos_R)


@triton.jit
def pair_gradient(s_RK, t_RK, inv_s_R, inv_t_R, one_minus_cos_R, factor_R, KIND: tl.constexpr):
    """factor * (s - t) of the mse; factor * ((s^ - t^) - (1 - cos) s^) of the others."""
    if KIND == MSE:
        return (s_RK - t_RK) * factor_R[:, None]
    else:
        unit_RK = s_RK * inv_s_R[:, None]
        e_RK = unit_RK - t_RK * inv_t_R[:, None]
        return tl.fma(-one_minus_cos_R[:, None], unit_RK, e_RK) * factor_R[:, None]
