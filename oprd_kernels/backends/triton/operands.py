"""Projectors and dz in the form of tensor-core operands.

A tensor core multiplies 16-bit numbers and truncates below the last place of its float32
accumulator. A number is therefore split into 16-bit terms. How many terms are used, and where sums
leave the accumulator, depends on the precision of the data:

- 16-bit states (bfloat16, float16): rounding the states has already cost 2^-9 or 2^-12. P is split
  into two terms of the states' dtype, and each rank is scaled by a power of two, `sigma`. The mean
  is projected to P mu and subtracted from z afterwards, so that a state is always one term.
- float32 states, by `torch.get_float32_matmul_precision()`: with "highest", three bfloat16 terms
  hold a float32 exactly. The six products that are not below float32's last place are used, and
  their sums are added outside the tensor core, slice by slice. "high" uses two terms and three
  products. "medium" uses one product.
- dz and P in backward: bfloat16 gradients use one float16 product, with dz scaled by a power of two
  per row and P by one per rank. float16 gradients are computed like float32 states with "high".
  float32 gradients are computed like float32 states.

Shapes: K ranks (r padded); D columns at a time; R rows.
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
"""Number of bfloat16 products that replace one float32 product, by precision."""
RANK_BLOCK = 128
"""The most ranks that a program multiplies by at a time. More ranks are split into blocks."""
MIN_DOT = 16
"""The smallest inner dimension of a product."""
COLUMNS = 128
"""Operands are padded with zeros to a multiple of this many columns, so their loads need no mask.
"""


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def padded_rank(rank: int, least: int = MIN_DOT) -> int:
    """Pad a rank to a power of two and at least ``least``, or above RANK_BLOCK to whole blocks."""
    if rank <= RANK_BLOCK:
        return max(next_power_of_2(rank), least)
    return -(-rank // RANK_BLOCK) * RANK_BLOCK


@dataclass(frozen=True)
class Plan:
    """The positions, in floats, of the parts of ``saved`` and of the workspace with a projection.

    ``saved`` holds, in order: HEAD floats; sigma of P_S (K); the terms of P_S for backward (K x
    width each); the scales of the rows of dz (M, only for bfloat16 gradients); dz (M, dz_k). dz is
    float32, or float16 followed by its rounding errors in the same shape, which dP needs and dH
    does not.

    The workspace holds, in order: sigma of P_T and P_T mu (K each); the terms of P_S and of P_T;
    the parts whose size depends on the rows, which are the sums of programs and z.

    Attributes:
        k: Number of ranks of the operands.
        dz_k: Number of ranks of dz.
        forward_k: Number of ranks that forward multiplies by. 8 is enough for 16-bit states,
            because their two terms make 16 rows.
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
        """Return the number of floats for the scales and dz of m rows."""
        if self.half_dz:
            return aligned(m) + 2 * aligned(m * self.dz_k // 2)
        return aligned(m * self.dz_k)

    def saved_size(self, m: int) -> int:
        """Return the number of floats in ``saved`` for m rows."""
        return self.scales + self.dz_size(m)


@functools.cache
def plan(
    rank: int, student_width: int, teacher_width: int, student: torch.dtype, teacher: torch.dtype
) -> Plan:
    """Return the plan of a call. ``teacher_width`` is 0 if the teacher is already projected."""
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
    """Return the power of two at or below ``peak``, and its inverse.

    The power is clamped so that its inverse is a normal float32.
    """
    bits = peak.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def rest_of_dz(m, DZ_K: tl.constexpr):
    """Return the offset from the float16 dz to its rounding errors, in elements."""
    return 2 * aligned_rows(m.to(tl.int64) * (DZ_K // 2))


@triton.jit
def magnitude(x):
    """Return |x| by clearing its sign bit. The bits of NaN are then larger than of any number."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def cut(x):
    """Split float32 x into its upper 16 bits as bfloat16 and the exact rest, without rounding."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return high, x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x rounded to ``dtype``, and the rest."""
    high = x.to(dtype)
    return high, x - high.to(tl.float32)


@triton.jit
def terms_of(x, PRODUCTS: tl.constexpr):
    """Split float32 x into three bfloat16 terms.

    The terms are exact for six products. Three products use only the first two, and one product
    uses only the first.
    """
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
    """Return z + a b, with small products first.

    The tensor core sums the products of this call in a separate accumulator, which is then added to
    z in float32.
    """
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
    """Store the terms, sigma and P mu of rank k of one projector, and in ``back`` its terms for
    backward."""
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
    """Store the three bfloat16 terms of p, each in its own plane."""
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
    """Prepare rank program_id(0) of projector program_id(1) as the module docstring describes.

    Ranks from r on are zeros. The first program also resets the ticket for the next launch.
    """
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
