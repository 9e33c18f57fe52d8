"""Launch configurations: a small fixed table, by device generation, dtype, width and rank.

Never by the number of rows, which changes with every batch: nothing is tuned or recompiled at run
time. Chosen by reading registers, spills and load widths off compiled kernels
(``python -m benchmarks.gpu_static``), as no GPU was at hand to time them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MAX_ROW_BLOCK = 16384
"""Elements of a row that a program keeps in registers."""
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


def _warps(elements: int, per_thread: int, generation: str) -> int:
    threads = 64 if generation.startswith("gfx") else 32
    return min(max(next_power_of_2(elements // (per_thread * threads)), 1), 512 // threads)


@functools.cache
def identity_forward(generation: str, width: int) -> Config:
    """Whole rows in registers: 16 elements of each tensor a thread, 32 in the widest."""
    if width > MAX_ROW_BLOCK:
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


@functools.cache
def projection(generation: str, bf16: bool, rank: int) -> Config:
    """Forward. Rows >= ranks as far as registers go, so that reading P again for every block of
    rows does not outweigh the hidden states themselves."""
    ranks = min(max(next_power_of_2(rank), 16), MAX_RANK_BLOCK)
    stages = 2 if generation.startswith("gfx") else 3
    if ranks <= FUSED_RANK:
        rows, columns, threads = 64, 64, 128
    elif ranks == 128:
        rows, columns, threads = 128, 32, 256
    else:
        rows, columns, threads = 128, 32, 512
    if not bf16:  # goes into the products as float32
        columns = 32
    warps = threads // (64 if generation.startswith("gfx") else 32)
    return Config(rows, columns, ranks, warps, stages)


@functools.cache
def projection_backward(generation: str, rank: int) -> Config:
    """Backward: tiles of the gradient, a few ranks at a time."""
    if rank <= FMA_RANK:
        return Config(32, 128, 16, 2 if generation.startswith("gfx") else 4, 1)
    threads = 64 if generation.startswith("gfx") else 32
    return Config(64, 128, 32, 256 // threads, 2)


def precision(rank: int) -> str:
    """How `tl.dot` multiplies float32 operands."""
    return "ieee" if rank <= FMA_RANK else "bf16x6"
