"""The float32 buffer ``saved`` that this backend keeps from forward to backward.

HEAD floats: the batch statistics, then a ticket of the reduction. Then, for rows compared as they
are, four arrays over rows: 1 / |s| (0 for a row that gets no gradient), 1 / |t|, 1 - cos, the loss.
After a projection `oprd_kernels.backends.triton.operands.Plan` says what follows. Sections begin at
multiples of ALIGN floats.
"""

import triton
import triton.language as tl

HEAD = tl.constexpr(32)
ALIGN = tl.constexpr(32)
SCALE = tl.constexpr(4)
"""Where the factor of the reduction is."""
TICKET = tl.constexpr(8)
"""Where an int32 is that counts the programs whose sums are there; 0 before and after a launch."""
SUMS = tl.constexpr(8)
"""Floats that a program leaves for the reduction: loss, cosine, student norm, teacher norm, number
of rows whose weight is not 0, sum of the weights; padded."""


def aligned(n):
    """n rounded up to whole sections."""
    return -(-n // 32) * 32


@triton.jit
def aligned_rows(m):
    """`aligned`, inside a kernel: 64 bits."""
    return (m.to(tl.int64) + (ALIGN - 1)) // ALIGN * ALIGN


@triton.jit
def ticket_of(saved):
    """The ticket of a layer's ``saved``."""
    return (saved + TICKET).to(tl.pointer_type(tl.int32))


@triton.jit
def layer_saved(saved, saved_size):
    """The ``saved`` of the layer that is program_id(1)."""
    return saved + tl.program_id(1).to(tl.int64) * saved_size
