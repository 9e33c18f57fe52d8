"""The float32 buffer ``saved`` that this backend keeps from forward to backward.

Its first HEAD floats hold the batch statistics and a ticket of the reduction. Without a projection,
four arrays over rows follow: 1 / |s| (0 for a row that gets no gradient), 1 / |t|, 1 - cos, and the
loss. With a projection, `oprd_kernels.backends.triton.operands.Plan` defines the rest. Sections
begin at multiples of ALIGN floats.
"""

import triton
import triton.language as tl

HEAD = tl.constexpr(32)
ALIGN = tl.constexpr(32)
SCALE = tl.constexpr(4)
"""Index of the factor of the reduction."""
TICKET = tl.constexpr(8)
"""Index of an int32 that counts the programs that have stored their sums. It is 0 before and after
a launch."""
SUMS = tl.constexpr(8)
"""Number of floats that a program stores for the reduction: sums of loss, cosine, student norm and
teacher norm, number of rows whose weight is not 0, sum of the weights, and padding."""


def aligned(n):
    """Round n up to a multiple of ALIGN."""
    return -(-n // 32) * 32


@triton.jit
def aligned_rows(m):
    """Compute `aligned` inside a kernel, in 64 bits."""
    return (m.to(tl.int64) + (ALIGN - 1)) // ALIGN * ALIGN


@triton.jit
def ticket_of(saved):
    """Return a pointer to the ticket of a layer's ``saved``."""
    return (saved + TICKET).to(tl.pointer_type(tl.int32))


@triton.jit
def layer_saved(saved, saved_size):
    """Return the ``saved`` of layer program_id(1)."""
    return saved + tl.program_id(1).to(tl.int64) * saved_size
