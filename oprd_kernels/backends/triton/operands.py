"""Projectors and dz in the form in which tensor cores multiply by them.

A tensor core multiplies 16-bit numbers, and cuts off what is below the last place of its float32
accumulator. How many terms stand for a number, and where sums leave the accumulator, follows from
what the data are worth:

- 16-bit states (bfloat16, float16): rounding them has cost 2^-9 or 2^-12 already. P comes as two
  terms of the states' own type, scaled by a power of two a rank, `sigma`; the mean as P mu, which
  is taken from z afterwards, so that a state is never more than one term.
- float32 states, `torch.get_float32_matmul_precision()`: "highest": three bfloat16 terms hold a
  float32 exactly; the six products that are not below float32's last place, summed outside the
  tensor core slice by slice. "high": two terms, three products. "medium": one.
- dz and P in backward: bfloat16 gradients: one float16 product, dz scaled row by row by powers of
  two, P rank by rank; float16 gradients: as float32 states at "high"; float32
  gradients: as float32 states.

Shapes: K ranks, r padded; D columns at a time; R rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from oprd_kernels.backends.triton.pair import launched
from oprd_kernels.backends.triton.saved import HEAD, aligned, aligned_rows, ticket_of

PRODUCTS = {"highest": 6, "high": 3, "medium": 1}
"""Products of bfloat16 terms that stand for one of float32 numbers."""
RANK_BLOCK = 128
"""Ranks that a program multiplies by at a time, above which it takes blocks of them."""
MIN_DOT = 16
"""The least inner dimension of a product."""
COLUMNS = 128
"""Operands are padded with zeros to a multiple of so many columns: no load of one is masked."""


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def padded_rank(rank: int, least: int = MIN_DOT) -> int:
    """A power of two, at ``least``, up to RANK_BLOCK; then whole blocks."""
    if rank <= RANK_BLOCK:
        return max(next_power_of_2(rank), least)
    return -(-rank // RANK_BLOCK) * RANK_BLOCK


@dataclass(frozen=True)
class Plan:
    """Where the parts of ``saved`` and of the workspace of a projection are, in floats.

    ``saved``: HEAD, then sigma of P_S (K), then P_S's terms for backward (K x width each), then the
    scales of dz's rows (M, only for bfloat16 gradients), then dz (M, dz_k) in float32, or in
    float16 and, of the same shape, what that left over: dP needs it, dH does not.
    Workspace: sigma of P_T, P_T mu (K each), the terms of P_S and P_T, then what depends on the
    rows: the sums of programs, z.

    Attributes:
        k: ranks of the operands.
        dz_k: ranks of dz.
        forward_k: ranks that forward multiplies by: 8 will do for 16-bit states, whose two terms
            make 16 rows.
    """

    k: int
    dz_k: int
    forward_k: int
    student_columns: int
    teacher_columns: int
    half_dz: bool
    operand: int
    scales: int
    student_terms: int
    teacher_terms: int
    rest: int

    def dz_size(self, m: int) -> int:
        """Floats of the scales and dz of m rows."""
        if self.half_dz:
            return aligned(m) + 2 * aligned(m * self.dz_k // 2)
        return aligned(m * self.dz_k)

    def saved_size(self, m: int) -> int:
        """Floats in ``saved`` for m rows."""
        return self.scales + self.dz_size(m)


@functools.cache
def plan(
    rank: int, student_width: int, teacher_width: int, student: torch.dtype, teacher: torch.dtype
) -> Plan:
    """The plan of a call. ``teacher_width`` 0: the teacher is r wide already."""
    k = padded_rank(rank)
    columns = [-(-width // COLUMNS) * COLUMNS for width in (student_width, teacher_width)]
    half_dz = student is torch.bfloat16
    dz_k = padded_rank(rank, 8)
    has_float = torch.float32 in ((student, teacher) if teacher_width else (student,))
    forward_k = k if has_float else dz_k
    planes = 1 if half_dz else 3
    operand = HEAD.value + aligned(k)
    scales = operand + aligned(planes * k * columns[0] // 2)
    terms = [3 if dtype is torch.float32 else 2 for dtype in (student, teacher)]
    student_terms = aligned(2 * k)
    teacher_terms = student_terms + aligned(terms[0] * k * columns[0] // 2)
    rest = teacher_terms + aligned(terms[1] * k * columns[1] // 2)
    return Plan(
        k, dz_k, forward_k, columns[0], columns[1], half_dz, operand, scales, student_terms,
        teacher_terms, rest,
    )  # fmt: skip


@triton.jit
def power_of_2(peak):
    """The power of two at or below ``peak``, clamped so that its inverse is one too; and that."""
    bits = peak.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def rest_of_dz(m, DZ_K: tl.constexpr):
    """How far behind dz in float16 is what that left over, in elements."""
    return 2 * aligned_rows(m.to(tl.int64) * (DZ_K // 2))


@triton.jit
def magnitude(x):
    """|x| by its bits: NaN is larger than all numbers."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def cut(x):
    """(the upper 16 bits of float32 x as bfloat16, the exact rest): no rounding, no conversion."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return high, x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """(x rounded to ``dtype``, the rest)."""
    high = x.to(dtype)
    return high, x - high.to(tl.float32)


@triton.jit
def terms_of(x, PRODUCTS: tl.constexpr):
    """float32 x in three bfloat16 terms; all of it for six products (then two are exact enough
    for three, and one for one)."""
    if PRODUCTS == 6:
        high, rest = cut(x)
        middle, rest = cut(rest)
        low, _ = cut(rest)
        return high, middle, low
    else:
        high, rest = rounded(x, tl.bfloat16)
        middle = rest.to(tl.bfloat16)
        return high, middle, middle


@triton.jit
def add_products(a_high, a_middle, a_low, b_high, b_middle, b_low, z, PRODUCTS: tl.constexpr):
    """z + a b, small products first. The products of this call are summed by the tensor core, into
    an accumulator of their own, which then is added to z in float32."""
    part = tl.zeros(z.shape, tl.float32)
    if PRODUCTS == 6:
        part = tl.dot(a_low, b_high, part)
        part = tl.dot(a_middle, b_middle, part)
        part = tl.dot(a_high, b_low, part)
    if PRODUCTS >= 3:
        part = tl.dot(a_middle, b_high, part)
        part = tl.dot(a_high, b_middle, part)
    part = tl.dot(a_high, b_high, part)
    return z + part


@triton.jit
def prepare_side(
    proj, mean, sigma, p_mu, terms, back, k, rank, dtype: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rank k of one projector: its terms, sigma, P mu; ``back``: its terms for backward."""
    peak_B = tl.zeros((B,), tl.float32)
    mu_B = tl.zeros((B,), tl.float64)
    row = proj + k.to(tl.int64) * WIDTH
    for first in range(0, COLUMNS, B):
        d_B = first + tl.arange(0, B)
        p_B = tl.load(row + d_B, mask=(d_B < WIDTH) & (k < rank), other=0.0)
        peak_B = tl.maximum(peak_B, magnitude(p_B))
        if mean is not None:
            mean_B = tl.load(mean + d_B, mask=d_B < WIDTH, other=0.0)
            mu_B += p_B.to(tl.float64) * mean_B.to(tl.float64)
    scale, inverse = power_of_2(tl.max(peak_B, axis=0))
    tl.store(sigma + k, scale)
    if mean is not None:
        tl.store(p_mu + k, tl.sum(mu_B, axis=0).to(tl.float32))
    plane = K * COLUMNS
    for first in range(0, COLUMNS, B):
        d_B = first + tl.arange(0, B)
        inside_B = d_B < COLUMNS
        p_B = tl.load(row + d_B, mask=(d_B < WIDTH) & (k < rank), other=0.0)
        if dtype == tl.float32:
            at_B = terms.to(tl.pointer_type(tl.bfloat16)) + k.to(tl.int64) * COLUMNS + d_B
            store_terms(at_B, plane, p_B, inside_B)
        else:
            high_B, rest_B = rounded(p_B * inverse, dtype)
            at_B = terms.to(tl.pointer_type(dtype)) + k.to(tl.int64) * (2 * COLUMNS) + d_B
            tl.store(at_B, high_B, mask=inside_B)
            tl.store(at_B + COLUMNS, rest_B.to(dtype), mask=inside_B)
        if back is not None:
            if dtype == tl.bfloat16:
                at_B = back.to(tl.pointer_type(tl.float16)) + k.to(tl.int64) * COLUMNS + d_B
                tl.store(at_B, (p_B * inverse).to(tl.float16), mask=inside_B)
            else:
                at_B = back.to(tl.pointer_type(tl.bfloat16)) + k.to(tl.int64) * COLUMNS + d_B
                store_terms(at_B, plane, p_B, inside_B)


@triton.jit
def store_terms(at_B, plane, p_B, inside_B):
    """The three bfloat16 terms of p, a plane each."""
    high_B, rest_B = rounded(p_B, tl.bfloat16)
    middle_B, rest_B = rounded(rest_B, tl.bfloat16)
    tl.store(at_B, high_B, mask=inside_B)
    tl.store(at_B + plane, middle_B, mask=inside_B)
    tl.store(at_B + 2 * plane, rest_B.to(tl.bfloat16), mask=inside_B)


@launched
def prepare(
    student_proj, teacher_proj, teacher_mean, saved, work, rank,
    S_TYPE: tl.constexpr, T_TYPE: tl.constexpr, K: tl.constexpr,
    S_WIDTH: tl.constexpr, S_COLUMNS: tl.constexpr, T_WIDTH: tl.constexpr, T_COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr, S_TERMS: tl.constexpr, T_TERMS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rank program_id(0) of both projectors (program_id(1)), as the module says; zeros for ranks
    from r on. Readies the ticket for the launch that follows."""
    k = tl.program_id(0)
    if tl.program_id(1) == 0:
        if k == 0:
            tl.store(ticket_of(saved), 0)
        prepare_side(
            student_proj, None, saved + HEAD, None, work + S_TERMS, saved + OPERAND, k, rank,
            S_TYPE, K, S_WIDTH, S_COLUMNS, B,
        )  # fmt: skip
    elif teacher_proj is not None:
        prepare_side(
            teacher_proj, teacher_mean, work, work + K, work + T_TERMS, None, k, rank, T_TYPE, K,
            T_WIDTH, T_COLUMNS, B,
        )  # fmt: skip
