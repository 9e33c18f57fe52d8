"""A check whether a gradient tensor may be modified in place.

Autograd may hand one tensor to several holders: to both branches of an addition, to a hook that
keeps it, or as a view of another gradient. Writing into such a tensor would corrupt the values of
the other holders. Three reference counts show whether there are any. They are compared with the
counts of a gradient without other holders, measured once on a small graph.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor


def _counts(grad: Tensor) -> tuple[int, int, int]:
    """Return the reference counts of the Python object, the tensor and its storage."""
    storage = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    return sys.getrefcount(grad), grad._use_count(), storage  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """Identity that records the counts of its incoming gradient, as `rep_tap` would see them."""

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
    """Return the counts of a gradient without other holders.

    None if this version of torch does not expose the counts, or if a gradient with two holders has
    a smaller count.
    """
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
    """Return whether the calling backward function is the only holder of ``grad``'s memory.

    The caller must hold the gradient in exactly one local variable.
    """
    if torch.is_grad_enabled() or grad.layout != torch.strided or grad._is_view():
        return False
    if 0 in grad.stride():
        return False
    baseline = _exclusive_counts()
    if baseline is None:
        return False
    # The argument of this function is one more Python reference than the probe had.
    python, tensor, storage = _counts(grad)
    return python - 1 <= baseline[0] and tensor <= baseline[1] and storage <= baseline[2]
