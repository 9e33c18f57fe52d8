"""Launch configurations: a small fixed table, by device generation, width and rank.

Nothing is tuned at run time, and nothing recompiled because a batch has another number of rows: few
rows choose another kernel, not another configuration of one. Chosen by what compiled code says of
registers, spills and shared memory (``python -m benchmarks.gpu_static``), for sm90 also by what was
measured there of kernels like these; these have not run on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

from oprd_kernels.backends.triton.operands import RANK_BLOCK, next_power_of_2

MAX_PIECES = 8
"""Pieces of a row that a program keeps in registers."""
MAX_WARPS = 8
WIDE_BLOCK = 4096
"""Elements at a time of a row too wide for registers."""
RESIDENT_RANKS = (16, 32, 64, 128, 256)
"""At these ranks dz of a program's rows stays on chip while the gradient's columns go by."""

Entry = TypeVar("Entry")


class Config(NamedTuple):
    """Rows, columns and ranks of a program's blocks; warps of 32 threads (64 on AMD)."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


class RowConfig(NamedTuple):
    """A row as ``pieces`` of ``columns`` elements."""

    columns: int
    pieces: int
    warps: int


def _warp_size(generation: str) -> int:
    return 64 if generation.startswith("gfx") else 32


def piece(generation: str, itemsize: int, warps: int) -> int:
    """Elements of which each thread has 16 bytes."""
    return 16 // itemsize * _warp_size(generation) * warps


@functools.cache
def row(generation: str, width: int, itemsize: int) -> RowConfig | None:
    """As few warps as hold a row, of ``itemsize`` bytes an element, in registers; a thread has 16
    bytes of each piece. None: no number of warps does."""
    warps = 1
    while piece(generation, itemsize, warps) * MAX_PIECES < width:
        warps *= 2
        if warps > MAX_WARPS:
            return None
    columns = min(piece(generation, itemsize, warps), max(next_power_of_2(width), 16))
    return RowConfig(columns, -(-width // columns), warps)


def wide_row(generation: str) -> RowConfig:
    """A row read again for every use."""
    return RowConfig(WIDE_BLOCK, 1, 512 // _warp_size(generation))


# Rows, columns, threads and stages of a program, by generation and ranks. An accumulator of rows x
# ranks floats is to fit the registers of its threads, twice where both sides are in one program.
_HALF = {
    "sm90": {
        8: (128, 64, 128, 4),
        16: (128, 64, 128, 4),
        32: (128, 64, 256, 3),
        64: (128, 64, 256, 3),
        128: (128, 64, 256, 3),
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
"""`projected_forward` of 16-bit states."""
_FLOAT = {
    "sm90": {
        16: (128, 64, 256, 3),
        32: (128, 64, 256, 3),
        64: (128, 64, 256, 2),
        128: (128, 64, 256, 2),
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
"""`projected_forward`, and `project`, where a side has float32 states."""
_PROJECT = {
    "sm90": (256, 64, 256, 3),
    "sm80": (128, 64, 256, 3),
    "sm100": (128, 64, 256, 3),
    "gfx942": (128, 32, 256, 2),
}
"""`project` of RANK_BLOCK ranks of 16-bit states."""
_FEW = {"sm90": (64, 64, 128, 3), "sm80": (64, 64, 128, 3), "gfx942": (64, 32, 256, 2)}
"""`project` of few rows of 16-bit states."""
_RESIDENT = {
    16: (64, 128, 128, 3),
    32: (64, 128, 128, 3),
    64: (128, 64, 256, 3),
    128: (128, 64, 256, 3),
    256: (128, 128, 256, 2),
}
"""`half_backward`."""


def _table(generation: str, table: dict[str, Entry]) -> Entry:
    return table[generation if generation in table else "sm90"]


def _config(values: tuple, ranks: int, generation: str) -> Config:
    rows, columns, threads, stages = values
    return Config(rows, columns, ranks, threads // _warp_size(generation), stages)


@functools.cache
def projection(generation: str, ranks: int, has_float: bool) -> Config:
    """Forward, both sides in one program. ``has_float``: a side has float32 states."""
    return _config(_table(generation, _FLOAT if has_float else _HALF)[ranks], ranks, generation)


@functools.cache
def fuses(ranks: int, has_float: bool) -> bool:
    """Whether z of both sides fits one program."""
    return ranks <= (RANK_BLOCK // 2 if has_float else RANK_BLOCK)


@functools.cache
def project(generation: str, ranks: int, has_float: bool, few: bool) -> Config:
    """Forward, one side a program, ``ranks`` of them at a time."""
    if few and not has_float:
        return _config(_table(generation, _FEW), ranks, generation)
    if ranks == RANK_BLOCK and not has_float:
        return _config(_table(generation, _PROJECT), ranks, generation)
    return projection(generation, ranks, has_float)


@functools.cache
def comparison(generation: str, ranks: int) -> Config:
    """Comparing what `project` has left; ``ranks`` is a power of two."""
    rows = max(min(4096 // ranks, 128), 1)
    threads = min(max(rows * ranks // 16, 128), 512)
    return _config((rows, 0, threads, 1), ranks, generation)


@functools.cache
def half_backward(generation: str, ranks: int, accumulate: bool) -> Config:
    """Backward of bfloat16 states, ``ranks`` of RESIDENT_RANKS."""
    rows, columns, threads, stages = _RESIDENT[ranks]
    if ranks == 256 and generation == "sm80":  # as the least shared memory of that generation
        rows, columns = 64, 64
    elif ranks == 256 and accumulate:
        columns = 64
    if generation == "gfx942":
        stages = 2
    return _config((rows, columns, threads, stages), ranks, generation)


@functools.cache
def tiled_backward(generation: str, ranks: int) -> Config:
    """Backward of all other states."""
    if generation in ("sm90", "sm100"):
        return _config((128, 64, 256, 2), min(ranks, 64), generation)
    return _config((64, 64, 256, 2), min(ranks, 32), generation)


@functools.cache
def projector_gradient(generation: str, ranks: int) -> Config:
    """The gradient of the projector: rows at a time, columns and ranks of a program."""
    values = (32, 64, 256, 2) if generation == "gfx942" else (64, 128, 256, 2)
    return _config(values, min(ranks, 64), generation)
