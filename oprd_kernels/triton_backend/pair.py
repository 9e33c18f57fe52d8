"""What the kernels share: addresses of rows, and the loss of pairs of rows held in registers.

The same formulas as csrc/cpu/pair.h. Shapes: R rows of a program, D columns; zeros pad both.
Compiled with ``enable_fp_fusion=False``: contracted, ``a * x - b * y`` is not 0 for equal products,
and the gradient of equal rows would not be 0.
"""

import triton
import triton.language as tl

MSE = tl.constexpr(0)
NMSE = tl.constexpr(1)
COSINE = tl.constexpr(2)
EPS = tl.constexpr(1e-12)
SHRINK = tl.constexpr(2.0**-80)
"""For rows whose squares overflow float32: exact, and what it loses is below their last place."""

# Offsets into `saved`, see oprd_kernels/layout.py.
STATS = tl.constexpr(5)
SCALE = tl.constexpr(4)
ROW_STATS = tl.constexpr(3)


@triton.jit
def row_offsets(index, i_R, in_range_R, inner, stride_outer, stride_inner):
    """Where rows begin, in elements: 64 bits, as tensors may hold more than 2^31."""
    n_R = i_R.to(tl.int64)
    if index is not None:
        n_R = tl.load(index + i_R, mask=in_range_R, other=0)
    return (n_R // inner) * stride_outer + (n_R % inner) * stride_inner


@triton.jit
def load_block(x, row_R, d_D, stride_last, mask_RD):
    """(R, D) float32: columns d of rows that begin at row; 0 where masked."""
    at_RD = x + row_R[:, None] + d_D[None, :] * stride_last
    return tl.load(at_RD, mask=mask_RD, other=0.0).to(tl.float32)


@triton.jit
def row_weights(weights, i_R, in_range_R):
    """The rows' weights; 1 without ``weights``."""
    if weights is None:
        return tl.where(in_range_R, 1.0, 0.0)
    else:
        return tl.load(weights + i_R, mask=in_range_R, other=0.0)


@triton.jit
def reduction_factor(denominator, m, MEAN: tl.constexpr):
    """What a reduction multiplies every row by: 1 / denominator (default: m) of a mean, 0 if that
    is 0."""
    if not MEAN:
        return tl.full((), 1.0, tl.float32)
    elif denominator is None:
        return 1.0 / m.to(tl.float32) if m > 0 else 0.0
    else:
        divisor = tl.load(denominator)
        return tl.where(divisor == 0, 0.0, 1.0 / divisor)


@triton.jit
def inverse_norms(x_RD):
    """(R,) 1 / max(|x|, EPS), and whether |x| <= EPS."""
    squares_R = tl.sum(x_RD * x_RD, axis=1)
    overflow_R = squares_R == float("inf")
    factor_R = tl.where(overflow_R, SHRINK, 1.0)
    if tl.max(overflow_R.to(tl.int32), axis=0) > 0:
        small_RD = x_RD * factor_R[:, None]
        squares_R = tl.sum(small_RD * small_RD, axis=1)
    norm_R = tl.sqrt_rn(squares_R)
    zero_R = norm_R <= EPS  # false for NaN, which stays NaN
    return tl.div_rn(factor_R, tl.where(zero_R, EPS, norm_R)), zero_R


@triton.jit
def pair_stats(s_RD, t_RD, width, KIND: tl.constexpr):
    """(R,) loss, 1 / |s|, 1 / |t| and 1 - cos.

    1 - cos is measured as s^ . (s^ - t^): without cancellation, and with the very s^ that the
    gradient uses, whose radial part it removes to rounding.
    """
    inv_s_R, zero_R = inverse_norms(s_RD)
    inv_t_R, _ = inverse_norms(t_RD)
    unit_RD = s_RD * inv_s_R[:, None]
    e_RD = unit_RD - t_RD * inv_t_R[:, None]
    one_minus_cos_R = tl.sum(unit_RD * e_RD, axis=1)
    if KIND == MSE:
        e_RD = s_RD - t_RD
    loss_R = tl.sum(e_RD * e_RD, axis=1)
    loss_R = tl.div_rn(loss_R, tl.zeros_like(loss_R) + (2 if KIND == COSINE else width))
    # A student row without a direction: cosine 0, gradient 0.
    return loss_R, tl.where(zero_R, 0.0, inv_s_R), inv_t_R, tl.where(zero_R, 1.0, one_minus_cos_R)


@triton.jit
def pair_gradient(
    s_RD, t_RD, inv_s_R, inv_t_R, one_minus_cos_R, coefficient_R, width, KIND: tl.constexpr
):
    """coefficient * d loss / d s: 2 (s - t) / D of the mse; ((s^ - t^) - (1 - cos) s^) / |s| of the
    cosine, 2 / D times that of the nmse."""
    per_width_R = tl.div_rn(tl.zeros_like(inv_s_R) + 2.0, tl.zeros_like(inv_s_R) + width)
    if KIND == MSE:
        return (s_RD - t_RD) * (coefficient_R * per_width_R)[:, None]
    else:
        unit_RD = s_RD * inv_s_R[:, None]
        e_RD = unit_RD - t_RD * inv_t_R[:, None]
        outer_R = coefficient_R * inv_s_R
        if KIND == NMSE:
            outer_R = outer_R * per_width_R
        return (e_RD - one_minus_cos_R[:, None] * unit_RD) * outer_R[:, None]


@triton.jit
def put_stats(
    loss, saved, i_R, in_range_R, m, weight_R, loss_R, inv_s_R, inv_t_R, one_minus_cos_R,
    EACH: tl.constexpr,
):  # fmt: skip
    """Store a row's results; of a masked row, zeros. EACH: the losses, weighted, are the result."""
    valid_R = weight_R != 0
    if EACH:
        tl.store(loss + i_R, tl.where(valid_R, loss_R * weight_R, 0.0), mask=in_range_R)
    else:
        row_loss = saved + STATS + ROW_STATS * m
        tl.store(row_loss + i_R, tl.where(valid_R, loss_R, 0.0), mask=in_range_R)
    row = saved + STATS + ROW_STATS * i_R.to(tl.int64)
    tl.store(row, tl.where(valid_R, inv_s_R, 0.0), mask=in_range_R)
    tl.store(row + 1, tl.where(valid_R, inv_t_R, 0.0), mask=in_range_R)
    tl.store(row + 2, tl.where(valid_R, one_minus_cos_R, 0.0), mask=in_range_R)
