"""Launch configurations: a small fixed table by device generation, width and rank.

Nothing is tuned at run time. A batch with another number of rows needs no recompilation, because
few rows select another kernel rather than another configuration. The values for sm90 are the
fastest of several on an H200, with 65,536 rows, 2,048 and 2,560 wide (few rows: 4,096). The others
were chosen from the registers, spills and shared memory of the compiled code (``python -m
benchmarks.gpu_static``) and have not run on such a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

from oprd_kernels.backends.triton.operands import RANK_BLOCK, next_power_of_2

MAX_PIECES = 8
"""The most pieces of a row that a program keeps in registers."""
MAX_WARPS = 8
WIDE_BLOCK = 4096
"""Number of elements processed at a time in a row that is too wide for registers."""
RESIDENT_RANKS = (16, 32, 64, 128, 256)
"""Ranks at which a program keeps dz of its rows on chip while it iterates over the columns of the
gradient."""

Entry = TypeVar("Entry")


class Config(NamedTuple):
    """Block sizes of a program in rows, columns and ranks, its warps (32 threads each, 64 on AMD)
    and its pipeline stages."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


class RowConfig(NamedTuple):
    """The split of a row into ``pieces`` of ``columns`` elements, and the warps of a program."""

    columns: int
    pieces: int
    warps: int


def _warp_size(generation: str) -> int:
    return 64 if generation.startswith("gfx") else 32


def piece(generation: str, itemsize: int, warps: int) -> int:
    """Return the number of elements in a piece, of which each thread has 16 bytes."""
    return 16 // itemsize * _warp_size(generation) * warps


@functools.cache
def row(generation: str, width: int, itemsize: int) -> RowConfig | None:
    """Return the configuration with the fewest warps that hold a row in registers.

    An element has ``itemsize`` bytes, and a thread has 16 bytes of each piece. None if even
    MAX_WARPS warps can't hold the row.
    """
    warps = 1
    while piece(generation, itemsize, warps) * MAX_PIECES < width:
        warps *= 2
        if warps > MAX_WARPS:
            return None
    columns = min(piece(generation, itemsize, warps), max(next_power_of_2(width), 16))
    return RowConfig(columns, -(-width // columns), warps)


def wide_row(generation: str) -> RowConfig:
    """Return the configuration for a row that is read from memory for every use."""
    return RowConfig(WIDE_BLOCK, 1, 512 // _warp_size(generation))


# Rows, columns, threads and stages of a program, by generation and ranks. An accumulator of rows x
# ranks floats must fit the registers of the threads; two must, if both sides are in one program.
_HALF = {
    "sm90": {
        8: (128, 64, 128, 3),
        16: (128, 64, 128, 4),
        32: (128, 64, 128, 4),
        64: (128, 64, 128, 3),
        128: (128, 64, 256, 4),
    },
    "sm80": {
        8: (64, 64, 128, 3),
        16: (64, 64, 128, 3),
        32: (64, 64, 128, 3),
        64: (64, 64, 256, 3),
        128: (64, 64, 256, 3),
    },
    "sm100": {
        8: (128, 64, 256, 3),
        16: (128, 64, 256, 3),
        32: (128, 64, 256, 3),
        64: (128, 64, 256, 3),
        128: (64, 64, 256, 3),
    },
    "gfx942": {
        8: (64, 64, 256, 2),
        16: (64, 64, 256, 2),
        32: (64, 64, 256, 2),
        64: (128, 32, 256, 2),
        128: (64, 32, 256, 2),
    },
}
"""For `projected_forward` of 16-bit states."""
_FLOAT = {
    "sm90": {
        16: (128, 64, 128, 3),
        32: (64, 64, 128, 3),
        64: (128, 64, 256, 3),
        128: (128, 64, 256, 3),
    },
    "sm80": {
        16: (64, 32, 256, 3),
        32: (64, 32, 256, 3),
        64: (64, 32, 256, 2),
        128: (64, 32, 256, 2),
    },
    "sm100": {
        16: (64, 64, 128, 3),
        32: (128, 64, 256, 3),
        64: (128, 64, 256, 2),
        128: (128, 64, 256, 2),
    },
    "gfx942": dict.fromkeys((16, 32, 64, 128), (64, 32, 256, 2)),
}
"""For `projected_forward` and `project` if a side has float32 states."""
_PROJECT = {
    "sm90": (128, 64, 128, 4),
    "sm80": (128, 64, 256, 3),
    "sm100": (128, 64, 256, 3),
    "gfx942": (128, 32, 256, 2),
}
"""For `project` of 16-bit states with RANK_BLOCK ranks."""
_FEW = {"sm90": (64, 64, 128, 4), "sm80": (64, 64, 128, 3), "gfx942": (64, 32, 256, 2)}
"""For `project` of few rows of 16-bit states."""
_UNMEASURED_RESIDENT = {
    16: (64, 128, 128, 3),
    32: (64, 128, 128, 3),
    64: (128, 64, 256, 3),
    128: (128, 64, 256, 3),
    256: (128, 128, 256, 2),
}
_RESIDENT = {
    "sm90": _UNMEASURED_RESIDENT | {64: (64, 128, 128, 3), 256: (64, 32, 128, 4)},
    # 256 ranks in the least shared memory of that generation.
    "sm80": _UNMEASURED_RESIDENT | {256: (64, 64, 256, 2)},
    "sm100": _UNMEASURED_RESIDENT,
    "gfx942": {n: (r, d, threads, 2) for n, (r, d, threads, _) in _UNMEASURED_RESIDENT.items()},
}
"""For `half_backward`."""


def _table(generation: str, table: dict[str, Entry]) -> Entry:
    return table[generation if generation in table else "sm90"]


def _config(values: tuple, ranks: int, generation: str) -> Config:
    rows, columns, threads, stages = values
    return Config(rows, columns, ranks, threads // _warp_size(generation), stages)


@functools.cache
def projection(generation: str, ranks: int, has_float: bool) -> Config:
    """Return the configuration of forward with both sides in one program.

    ``has_float`` says that a side has float32 states.
    """
    return _config(_table(generation, _FLOAT if has_float else _HALF)[ranks], ranks, generation)


@functools.cache
def fuses(ranks: int, has_float: bool) -> bool:
    """Return whether z of both sides fits in one program."""
    return ranks <= (RANK_BLOCK // 2 if has_float else RANK_BLOCK)


@functools.cache
def project(generation: str, ranks: int, has_float: bool, few: bool) -> Config:
    """Return the configuration of forward with one side per program, ``ranks`` ranks at a time."""
    if few and not has_float:
        return _config(_table(generation, _FEW), ranks, generation)
    if ranks == RANK_BLOCK and not has_float:
        return _config(_table(generation, _PROJECT), ranks, generation)
    return projection(generation, ranks, has_float)


@functools.cache
def comparison(generation: str, ranks: int) -> Config:
    """Return the configuration of `compare`, which runs after `project`.

    ``ranks`` must be a power of two.
    """
    rows = max(min(2048 // ranks, 128), 1)
    threads = min(max(rows * ranks // 16, 128), 512)
    return _config((rows, 0, threads, 1), ranks, generation)


@functools.cache
def half_backward(generation: str, ranks: int, accumulate: bool) -> Config:
    """Return the configuration of backward for bfloat16 states; ``ranks`` is in RESIDENT_RANKS."""
    rows, columns, threads, stages = _table(generation, _RESIDENT)[ranks]
    if accumulate:
        columns = min(columns, 16384 // ranks)
    return _config((rows, columns, threads, stages), ranks, generation)


@functools.cache
def tiled_backward(generation: str, ranks: int, accumulate: bool) -> Config:
    """Return the configuration of backward for all other states."""
    if generation == "sm90":
        most = 32 if accumulate and ranks > 64 else 64  # the registers that are left
        return _config((64, 128, 128, 2), min(ranks, most), generation)
    if generation == "sm100":
        return _config((128, 64, 256, 2), min(ranks, 64), generation)
    return _config((64, 64, 256, 2), min(ranks, 32), generation)


@functools.cache
def projector_gradient(generation: str, ranks: int, is_float: bool) -> Config:
    """Return the configuration of the projector's gradient.

    It holds the rows processed at a time, and the columns and ranks of a program. ``is_float`` says
    that the states are float32.
    """
    values = (64, 128, 256, 2)
    if generation == "sm90":
        values = (32 if is_float else 64, 128, 128, 3)
    elif generation == "gfx942":
        values = (32, 64, 256, 2)
    return _config(values, min(ranks, 64), generation)
