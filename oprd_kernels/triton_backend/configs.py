"""Launch configurations: a small fixed table, by device generation, width and rank.

Never by the number of rows, which changes with every batch: nothing is tuned or recompiled at run
time. Chosen by reading registers, spills and load widths off compiled kernels
(``python -m benchmarks.gpu_static``), as no GPU was at hand to time them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MAX_ROW_BLOCK = 16384
"""Elements of a row that a program keeps in registers; half of it if it also forms the gradient."""
WIDE_BLOCK = 8192
FMA_RANK = 16
"""Up to this rank float32 operands are multiplied by plain FMA."""
MAX_RANK_BLOCK = 256
FUSED_RANK = 64
"""Up to this rank z_S and z_T of a program's rows fit its registers together."""
GENERATIONS = ("sm80", "sm90", "sm100", "gfx942")


class Config(NamedTuple):
    """Rows, columns and ranks of a program's blocks; warps of 32 threads (64 on AMD)."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _warp_size(generation: str) -> int:
    return 64 if generation.startswith("gfx") else 32


def _warps(elements: int, per_thread: int, generation: str) -> int:
    threads = _warp_size(generation)
    return min(max(next_power_of_2(elements // (per_thread * threads)), 1), 512 // threads)


@functools.cache
def identity_forward(generation: str, width: int, with_gradient: bool) -> Config:
    """Whole rows in registers: 16 elements of each tensor a thread, 32 in the widest."""
    if width > MAX_ROW_BLOCK // (2 if with_gradient else 1):
        return Config(1, WIDE_BLOCK, 0, _warps(WIDE_BLOCK, 16, generation), 1)
    columns = max(next_power_of_2(width), 16)
    rows = max(2048 // columns, 1)
    return Config(min(rows, 32), columns, 0, _warps(min(rows, 32) * columns, 16, generation), 1)


@functools.cache
def identity_backward(generation: str, width: int) -> Config:
    """Element by element: tiles of 2,048, so that a thread has two vectors of each operand."""
    columns = min(max(next_power_of_2(width), 16), 1024)
    rows = min(2048 // columns, 32)
    return Config(rows, columns, 0, _warps(rows * columns, 16, generation), 1)


# Rows, columns, threads and stages of the projection by (generation, ranks in a block). Rows >=
# ranks as far as registers go: every block of rows reads P again, out of L2. The float32
# accumulators of 256 x 256 alone would fill a multiprocessor's registers, so there it is 128 rows,
# and where operands come from registers too (sm80, gfx942), 64.
_PROJECTION = {
    **{(g, r): (128, 32, 256, 3) for g in ("sm80", "sm90", "sm100") for r in (16, 32, 64, 128)},
    ("sm80", 256): (64, 16, 256, 3),
    ("sm90", 256): (128, 32, 256, 2),
    ("sm100", 256): (128, 32, 256, 2),
    **{("gfx942", r): (64, 32, 256, 2) for r in (32, 64, 256)},
    **{("gfx942", r): (128, 32, 256, 2) for r in (16, 128)},
}


@functools.cache
def projection(generation: str, rank: int) -> Config:
    """Forward: blocks of rows by all of d, for up to MAX_RANK_BLOCK ranks."""
    ranks = min(max(next_power_of_2(rank), 16), MAX_RANK_BLOCK)
    rows, columns, threads, stages = _PROJECTION[generation, ranks]
    return Config(rows, columns, ranks, threads // _warp_size(generation), stages)


@functools.cache
def projection_backward(generation: str, rank: int) -> Config:
    """Backward: tiles of the gradient, a few ranks at a time."""
    warps = 256 // _warp_size(generation)
    if rank <= FMA_RANK:
        return Config(32, 128, 16, warps, 1)
    return Config(64, 128, 32, warps, 2)
