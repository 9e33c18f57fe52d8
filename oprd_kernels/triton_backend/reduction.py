"""From row losses to the loss: sums in a fixed order, in two stages where there are many rows."""

import triton
import triton.language as tl

from oprd_kernels.triton_backend.pair import (
    ROW_STATS,
    SCALE,
    STATS,
    reduction_factor,
    row_weights,
)

COLUMNS = tl.constexpr(8)
"""Sums a chunk: loss, cosine, student norm, teacher norm, count; padded."""


@triton.jit(do_not_specialize=["m", "chunk"])
def sum_chunk(loss, saved, weights, partial, m, chunk, EACH: tl.constexpr, B: tl.constexpr):
    """Sums over rows [n * chunk, (n + 1) * chunk), n = program_id(0), B rows at a time."""
    n = tl.program_id(0)
    loss_B = tl.zeros((B,), tl.float32)
    cos_B = tl.zeros((B,), tl.float32)
    s_norm_B = tl.zeros((B,), tl.float32)
    t_norm_B = tl.zeros((B,), tl.float32)
    count_B = tl.zeros((B,), tl.float32)
    for first in range(0, chunk, B):
        i_B = n * chunk + first + tl.arange(0, B)
        weight_B = row_weights(weights, i_B, i_B < tl.minimum(m, (n + 1) * chunk))
        valid_B = weight_B != 0
        if not EACH:
            row_loss = saved + STATS + ROW_STATS * m.to(tl.int64)
            loss_B += weight_B * tl.load(row_loss + i_B, mask=valid_B, other=0.0)
        row = saved + STATS + ROW_STATS * i_B.to(tl.int64)
        inv_s_B = tl.load(row, mask=valid_B, other=0.0)
        inv_t_B = tl.load(row + 1, mask=valid_B, other=1.0)
        cos_B += tl.where(valid_B, 1.0 - tl.load(row + 2, mask=valid_B, other=0.0), 0.0)
        zero_B = inv_s_B == 0
        s_norm_B += tl.where(zero_B, 0.0, 1.0 / tl.where(zero_B, 1.0, inv_s_B))
        t_norm_B += tl.where(valid_B, 1.0 / inv_t_B, 0.0)
        count_B += tl.where(valid_B, 1.0, 0.0)
    row = partial + n * COLUMNS
    tl.store(row, tl.sum(loss_B, axis=0))
    tl.store(row + 1, tl.sum(cos_B, axis=0))
    tl.store(row + 2, tl.sum(s_norm_B, axis=0))
    tl.store(row + 3, tl.sum(t_norm_B, axis=0))
    tl.store(row + 4, tl.sum(count_B, axis=0))


@triton.jit(do_not_specialize=["m", "chunks"])
def finish(
    loss, saved, partial, denominator, m, chunks, MEAN: tl.constexpr, EACH: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The loss, unless EACH row's is the result, and the batch statistics, from chunks' sums."""
    n_N = tl.arange(0, N)
    row_N = partial + n_N * COLUMNS
    mask_N = n_N < chunks
    total = tl.sum(tl.load(row_N, mask=mask_N, other=0.0), axis=0)
    cos = tl.sum(tl.load(row_N + 1, mask=mask_N, other=0.0), axis=0)
    s_norm = tl.sum(tl.load(row_N + 2, mask=mask_N, other=0.0), axis=0)
    t_norm = tl.sum(tl.load(row_N + 3, mask=mask_N, other=0.0), axis=0)
    count = tl.sum(tl.load(row_N + 4, mask=mask_N, other=0.0), axis=0)
    scale = reduction_factor(denominator, m, MEAN)
    if not EACH:
        # A denominator of 0 stands for "nothing to learn from": exactly 0, whatever the rows hold.
        tl.store(loss, tl.where(scale == 0, 0.0, total * scale))
    per_row = tl.where(count == 0, 0.0, 1.0 / tl.where(count == 0, 1.0, count))
    tl.store(saved, cos * per_row)
    tl.store(saved + 1, s_norm * per_row)
    tl.store(saved + 2, t_norm * per_row)
    tl.store(saved + 3, count)
    tl.store(saved + SCALE, scale)
