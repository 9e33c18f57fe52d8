"""The list of backends, and the choice of one for a call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling

from oprd_kernels.backends import cpu, cuda
from oprd_kernels.backends.protocol import Backend, BackendUnavailable
from oprd_kernels.call import LossCall
from oprd_kernels.native import problem as native_problem

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""All backends. ``backend="auto"`` prefers them in this order; with a projection, whose tensor-core
kernels are faster, "triton" comes before "cuda"."""


def get(name: str) -> Backend:
    """Return the fused backend of that name."""
    if name == "cuda":
        return cuda.BACKEND
    if name == "cpu":
        return cpu.BACKEND
    return _triton().BACKEND


@functools.cache
def _triton() -> Any:
    from oprd_kernels.backends import triton  # imported late: it is slow and may be missing

    return triton


def unavailable(name: str, device: torch.device) -> str | None:
    """Return why the backend ``name`` can't run on ``device``, or None if it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    return None if name == "reference" else get(name).unavailable(device)


# The effect of torch.compiler.assume_constant_result, without its import time of seconds: the
# compiler calls the function once and does not trace through device properties.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_reference(device_type: str, reasons: str) -> None:
    warnings.warn(
        f"oprd_kernels: no fused kernel can run on {device_type} tensors here, so oprd uses the "
        f"plain PyTorch reference. {reasons} Pass backend='reference' to silence this warning.",
        stacklevel=5,
    )


def choose(name: str, calls: Sequence[LossCall]) -> str:
    """Return the name of the backend to use for a call, or for the calls of several layers.

    This is ``name``, or for "auto" the preferred one of BACKENDS that can do all calls.

    Raises:
        BackendUnavailable: If the named backend can't run or does not support the call. The message
            gives the reason.
        ValueError: If there is no backend of that name.
        RuntimeError: Under a torch.func transform, which the kernels do not support.
        TypeError: For a tensor subclass that wraps another tensor.
    """
    chosen = _first_that_can(calls) if name == "auto" else _named(name, calls)
    if chosen != "reference" and not is_compiling() and maybe_current_level() is not None:
        raise RuntimeError(
            "the kernels do not support torch.func transforms (grad, vmap, jvp, ..): use "
            "loss.backward() or torch.autograd.grad, or backend='reference'"
        )
    if chosen != "reference" and not is_compiling():
        _refuse_wrappers(calls)
    return chosen


def _named(name: str, calls: Sequence[LossCall]) -> str:
    reason = unavailable(name, calls[0].student.device)
    if reason is None and name != "reference":
        if _is_double(calls):
            reason = "it takes float32, bfloat16 and float16 tensors, not float64; use 'reference'"
        else:
            reason = _unsupported(get(name), calls)
    if reason:
        raise BackendUnavailable(f"backend={name!r} can't run: {reason}")
    return name


def _first_that_can(calls: Sequence[LossCall]) -> str:
    if _is_double(calls):
        return "reference"
    if calls[0].student.is_cpu:
        return "reference" if native_problem() else "cpu"
    device, reasons = calls[0].student.device, []
    for name in ("triton", "cuda") if calls[0].rank else ("cuda", "triton"):
        reason = unavailable(name, device)
        if reason is None:
            reason = _unsupported(get(name), calls)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}.")
    _warn_reference(device.type, " ".join(reasons))
    return "reference"


def _is_double(calls: Sequence[LossCall]) -> bool:
    for call in calls:  # noqa: SIM110 (a generator is slower than the comparisons)
        if call.is_double:
            return True
    return False


def _unsupported(backend: Backend, calls: Sequence[LossCall]) -> str | None:
    for call in calls:
        if reason := backend.unsupported(call):
            return reason
    return None


def _refuse_wrappers(calls: Sequence[LossCall]) -> None:
    """Raise for wrapper tensors, which have no memory of their own.

    Dispatch modes handle such tensors themselves, so nothing is checked under a mode.
    """
    for call in calls:
        for x in call[:2]:
            if (
                type(x) is not Tensor
                and _wraps(type(x))
                and not torch._C._len_torch_dispatch_stack()
            ):
                name = type(x).__name__
                raise TypeError(
                    f"kernels read memory directly, and a {name} has no memory of its own: pass "
                    "the tensor that it wraps (for an AsyncCollectiveTensor: x.wait()), or "
                    "backend='reference'"
                )


@functools.cache
def _wraps(kind: type) -> bool:
    plain = torch._C._disabled_torch_dispatch_impl
    return getattr(kind, "__torch_dispatch__", plain) is not plain
