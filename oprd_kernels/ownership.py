"""Whether a gradient may be added to where it is.

Autograd hands one tensor to several places: to both branches of an addition, to a hook that keeps
it, as a view of another gradient. Writing into such a tensor would corrupt the other holders'
values. Whether there are any shows in three counts, compared with what they are for a gradient
that surely has no other holder, measured once on a graph where that is known.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor


def _counts(grad: Tensor) -> tuple[int, int, int]:
    """References to the Python object, to the tensor, and to its storage."""
    storage = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    return sys.getrefcount(grad), grad._use_count(), storage  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """Records the counts of the gradient that reaches it, as `rep_tap`'s backward would see it."""

    @staticmethod
    def forward(ctx, x: Tensor, record: list) -> Tensor:
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.record.append(_counts(grad))
        return grad, None


@functools.cache
def _exclusive_counts() -> tuple[int, int, int] | None:
    """The counts of a gradient that a multiplication has just made for the probe alone; None if
    this version of torch does not tell, or if they would not tell it from a shared one."""
    record: list[tuple[int, int, int]] = []
    try:
        with torch.enable_grad():
            x = torch.zeros(2, requires_grad=True)
            (_Probe.apply(x, record) * 2.0).sum().backward()
            shared = _Probe.apply(x, record)
            (shared + x * 0.0).sum().backward()
    except (AttributeError, TypeError, RuntimeError):
        return None
    exclusive, other = record
    return exclusive if all(a <= b for a, b in zip(exclusive, other, strict=True)) else None


def may_add_into(grad: Tensor) -> bool:
    """Whether nobody but the caller, a backward function, holds ``grad``'s memory.

    To be called with the gradient in one local variable of the caller and nowhere else.
    """
    if torch.is_grad_enabled() or grad.layout != torch.strided or grad._is_view():
        return False
    if 0 in grad.stride():
        return False
    baseline = _exclusive_counts()
    if baseline is None:
        return False
    # One more Python reference than the probe's: this function's own argument.
    python, tensor, storage = _counts(grad)
    return python - 1 <= baseline[0] and tensor <= baseline[1] and storage <= baseline[2]
