"""The kernel parameters that describe where the rows of tensors are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""The properties of a tensor, other than its address, that determine a launch: shape, strides and
dtype. It is a plain tuple because every call makes several."""


def form(x: Tensor) -> Form:
    """Return the form of ``x``."""
    return x.shape, x.stride(), x.dtype


class Geometry(NamedTuple):
    """The geometry of the tensors of one launch.

    Attributes:
        strides: For each tensor: rows per outer index, outer stride, row stride and last stride.
            The outer and row strides are in units of ``unit`` elements.
        unit: A power of two up to 16 that divides all outer and row strides.
        flat: Whether a single row stride gives the position of every row.
        dense: Whether all last strides are 1.
    """

    strides: tuple[int, ...]
    unit: int
    flat: bool
    dense: bool


def geometry(*forms: Form | None) -> Geometry:
    """Return the geometry of tensors (N, d) or (B, T, d). None stands for an absent tensor."""
    places: list[tuple[int, int, int, int]] = []
    flat = dense = True
    bits = 0
    for x in forms:
        if x is None:
            places.append((1, 0, 0, 1))
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
        places.append((inner or 1, outer, row, last))
    unit = 16 if not bits & 15 else 8 if not bits & 7 else 4 if not bits & 3 else 1
    if not dense:
        unit = 1
    return Geometry(
        tuple([n for i, o, r, last in places for n in (i, o // unit, r // unit, last)]),
        unit, flat, dense,
    )  # fmt: skip
