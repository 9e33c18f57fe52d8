"""How kernels are told where the rows of their tensors are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""What a launch depends on of a tensor besides where it is: shape, strides, dtype. A plain tuple,
as every call makes several."""


def form(x: Tensor) -> Form:
    """The form of ``x``."""
    return x.shape, x.stride(), x.dtype


class Geometry(NamedTuple):
    """Of the tensors of one launch.

    Attributes:
        strides: for each tensor: rows per outer index, outer, row and last stride; the middle two
            in units of ``unit`` elements.
        unit: a power of two up to 16 that divides all these strides.
        flat: whether one stride says where every row is.
        dense: whether all last strides are 1.
    """

    strides: tuple[int, ...]
    unit: int
    flat: bool
    dense: bool


def geometry(*forms: Form | None) -> Geometry:
    """The geometry of tensors (N, d) or (B, T, d); of None, as if it were not there."""
    found: list[tuple[int, int, int, int]] = []
    flat = dense = True
    bits = 0
    for x in forms:
        if x is None:
            found.append((1, 0, 0, 1))
            continue
        shape, strides, _ = x
        inner, row, last = shape[-2], strides[-2], strides[-1]
        if len(strides) == 2:
            outer = 0
        else:
            outer = strides[0]
            if outer != inner * row:
                if shape[0] > 1:
                    flat = False
                else:
                    outer = 0
        if last != 1 and shape[-1] > 1:
            dense = False
        bits |= row | outer
        found.append((inner or 1, outer, row, last))
    unit = 16 if not bits & 15 else 8 if not bits & 7 else 4 if not bits & 3 else 1
    if not dense:
        unit = 1
    return Geometry(
        tuple([n for i, o, r, last in found for n in (i, o // unit, r // unit, last)]),
        unit, flat, dense,
    )  # fmt: skip
