"""The reduction of rows to the loss and the batch statistics, in a fixed order and one launch.

Each program stores the sums of its rows and draws a ticket. The program with the last ticket adds
the sums of all programs. It adds them in the order of the programs, so the result does not depend
on which program is last.
"""

import triton
import triton.language as tl

from oprd_kernels.backends.triton.pair import inverse, launched, row_weights
from oprd_kernels.backends.triton.saved import (
    HEAD,
    SCALE,
    SUMS,
    aligned_rows,
    layer_saved,
    ticket_of,
)


@triton.jit
def put_sums(partial, program, loss_R, cos_R, s_norm_R, t_norm_R, count_R, weight_R):
    """Store the sums over R as those of ``program``."""
    row = partial + program * SUMS
    tl.store(row, tl.sum(loss_R, axis=0))
    tl.store(row + 1, tl.sum(cos_R, axis=0))
    tl.store(row + 2, tl.sum(s_norm_R, axis=0))
    tl.store(row + 3, tl.sum(t_norm_R, axis=0))
    tl.store(row + 4, tl.sum(count_R, axis=0))
    tl.store(row + 5, tl.sum(weight_R, axis=0))


@triton.jit
def leave_sums(partial, program, weight_R, loss_R, inv_s_R, inv_t_R, one_minus_cos_R):
    """Store the sums of R rows as those of ``program``. Rows of weight 0 are left out."""
    valid_R = weight_R != 0
    zero_R = inv_s_R == 0
    s_norm_R = tl.where(zero_R, 0.0, tl.div_rn(1.0, tl.where(zero_R, 1.0, inv_s_R)))
    t_norm_R = tl.div_rn(1.0, tl.where(valid_R, inv_t_R, 1.0))
    put_sums(
        partial,
        program,
        tl.where(valid_R, weight_R * loss_R, 0.0),
        tl.where(valid_R, 1.0 - one_minus_cos_R, 0.0),
        tl.where(valid_R, s_norm_R, 0.0),
        tl.where(valid_R, t_norm_R, 0.0),
        tl.where(valid_R, 1.0, 0.0),
        weight_R,
    )


@triton.jit
def finish(
    loss, saved, partial, denominator, m, program, programs,
    HAS_WEIGHTS: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr,
    SCALE_ONLY: tl.constexpr = False,
):  # fmt: skip
    """Write the loss and the batch statistics if this is the last program to store its sums.

    With EACH, the row losses are the result and no reduced loss is written. With SCALE_ONLY, only
    the factor of the reduction is written. The sums of N programs are read at a time.
    """
    last = programs == 1
    if programs > 1:
        tl.debug_barrier()
        last = tl.atomic_add(ticket_of(saved), 1, sem="acq_rel") == programs - 1
    if last:
        tl.debug_barrier()
        loss_N = tl.zeros((N,), tl.float32)
        cos_N = tl.zeros((N,), tl.float32)
        s_norm_N = tl.zeros((N,), tl.float32)
        t_norm_N = tl.zeros((N,), tl.float32)
        count_N = tl.zeros((N,), tl.float32)
        weight_N = tl.zeros((N,), tl.float32)
        for first in range(0, programs, N):
            n_N = first + tl.arange(0, N)
            there_N = n_N < programs
            at_N = partial + n_N * SUMS
            # Bypass L1, which may hold older values.
            loss_N += tl.load(at_N, mask=there_N, other=0.0, cache_modifier=".cg")
            cos_N += tl.load(at_N + 1, mask=there_N, other=0.0, cache_modifier=".cg")
            s_norm_N += tl.load(at_N + 2, mask=there_N, other=0.0, cache_modifier=".cg")
            t_norm_N += tl.load(at_N + 3, mask=there_N, other=0.0, cache_modifier=".cg")
            count_N += tl.load(at_N + 4, mask=there_N, other=0.0, cache_modifier=".cg")
            weight_N += tl.load(at_N + 5, mask=there_N, other=0.0, cache_modifier=".cg")
        scale = tl.full((), 1.0, tl.float32)
        if MEAN:
            if denominator is not None:
                scale = inverse(tl.load(denominator))
            elif HAS_WEIGHTS:
                scale = inverse(tl.sum(weight_N, axis=0))
            else:
                scale = inverse(m.to(tl.float32))
        if not (EACH or SCALE_ONLY):
            # A denominator of 0 means that there is nothing to learn from. The loss is then 0,
            # whatever the rows hold.
            tl.store(loss, tl.where(scale == 0, 0.0, tl.sum(loss_N, axis=0) * scale))
        if not SCALE_ONLY:
            count = tl.sum(count_N, axis=0)
            per_row = inverse(count)
            tl.store(saved, tl.sum(cos_N, axis=0) * per_row)
            tl.store(saved + 1, tl.sum(s_norm_N, axis=0) * per_row)
            tl.store(saved + 2, tl.sum(t_norm_N, axis=0) * per_row)
            tl.store(saved + 3, count)
        tl.store(saved + SCALE, scale)
        tl.store(ticket_of(saved), 0)


@launched
def reduce_rows(
    loss, saved, weights, denominator, saved_size, m, chunk,
    MEAN: tl.constexpr, EACH: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
    SCALE_ONLY: tl.constexpr,
):  # fmt: skip
    """Reduce rows that were compared without a projection.

    program_id(0) sums ``chunk`` rows, B at a time; program_id(1) is the layer. The sums of the
    programs are stored after the arrays over rows. With SCALE_ONLY, only the factor of the
    reduction is computed from the weights, before the rows have been compared.
    """
    saved = layer_saved(saved, saved_size)
    size = aligned_rows(m)
    program, programs = tl.program_id(0), tl.num_programs(0)
    weight_B = tl.zeros((B,), tl.float32)
    loss_B = tl.zeros((B,), tl.float32)
    cos_B = tl.zeros((B,), tl.float32)
    s_norm_B = tl.zeros((B,), tl.float32)
    t_norm_B = tl.zeros((B,), tl.float32)
    count_B = tl.zeros((B,), tl.float32)
    end = tl.minimum(m, (program + 1) * chunk)
    for first in range(program * chunk, end, B):
        i_B = first + tl.arange(0, B)
        w_B = row_weights(weights, i_B, i_B < end)
        weight_B += w_B
        valid_B = (w_B != 0) & (not SCALE_ONLY)
        row = saved + HEAD + i_B
        inv_s_B = tl.load(row, mask=valid_B, other=0.0)
        inv_t_B = tl.load(row + size, mask=valid_B, other=1.0)
        omc_B = tl.load(row + 2 * size, mask=valid_B, other=1.0)
        zero_B = inv_s_B == 0
        if not EACH:
            loss_B += w_B * tl.load(row + 3 * size, mask=valid_B, other=0.0)
        cos_B += 1.0 - omc_B
        s_norm_B += tl.where(zero_B, 0.0, tl.div_rn(1.0, tl.where(zero_B, 1.0, inv_s_B)))
        t_norm_B += tl.where(valid_B, tl.div_rn(1.0, inv_t_B), 0.0)
        count_B += tl.where(valid_B, 1.0, 0.0)
    partial = saved + HEAD + 4 * size
    put_sums(partial, program, loss_B, cos_B, s_norm_B, t_norm_B, count_B, weight_B)
    finish(
        loss + tl.program_id(1), saved, partial, denominator, m, program, programs,
        weights is not None, MEAN, EACH, N, SCALE_ONLY,
    )  # fmt: skip
