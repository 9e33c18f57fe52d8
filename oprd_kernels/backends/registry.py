"""Which implementations can run here, and for those that cannot, why."""

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
"""In the order ``backend="auto"`` prefers them."""


def get(name: str) -> Backend:
    """The fused backend of that name."""
    if name == "cuda":
        return cuda.BACKEND
    if name == "cpu":
        return cpu.BACKEND
    return _triton().BACKEND


@functools.cache
def _triton() -> Any:
    from oprd_kernels.backends import triton  # takes long to import, and may be missing

    return triton


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend ``name`` can't work on tensors of ``device``; None if it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    return None if name == "reference" else get(name).unavailable(device)


# What torch.compiler.assume_constant_result does, without the seconds its import takes: a compiler
# asks once, and need not trace through device properties.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_reference(device_type: str, reasons: str) -> None:
    warnings.warn(
        f"oprd_kernels: no fused kernel can run on {device_type} tensors here, the plain PyTorch "
        f"reference is used. {reasons} backend='reference' silences this.",
        stacklevel=5,
    )


def choose(name: str, calls: Sequence[LossCall]) -> str:
    """The backend to use for a call, or for layers at once: the one named, or the first of BACKENDS
    that can do them all.

    Raises:
        BackendUnavailable: if the one named can't run, or can't do this call, with the reason.
        ValueError: if there is no backend of that name.
        RuntimeError: under a torch.func transform, which kernels can't do.
        TypeError: for a tensor that only stands for another.
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
    for name in ("cuda", "triton"):
        reason = unavailable(name, device)
        if reason is None:
            reason = _unsupported(get(name), calls)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}.")
    _warn_reference(device.type, " ".join(reasons))
    return "reference"


def _is_double(calls: Sequence[LossCall]) -> bool:
    for call in calls:  # noqa: SIM110 (a generator takes longer than the comparisons)
        if call.is_double:
            return True
    return False


def _unsupported(backend: Backend, calls: Sequence[LossCall]) -> str | None:
    for call in calls:
        if reason := backend.unsupported(call):
            return reason
    return None


def _refuse_wrappers(calls: Sequence[LossCall]) -> None:
    """Tensors that are not where their values are. Modes, under which they are met as a matter of
    course, take calls elsewhere."""
    for call in calls:
        for x in call[:2]:
            if (
                type(x) is not Tensor
                and _wraps(type(x))
                and not torch._C._len_torch_dispatch_stack()
            ):
                name = type(x).__name__
                raise TypeError(
                    f"kernels read memory, which a {name} has not: pass the tensor that it stands "
                    "for (of an AsyncCollectiveTensor: x.wait()), or backend='reference'"
                )


@functools.cache
def _wraps(kind: type) -> bool:
    plain = torch._C._disabled_torch_dispatch_impl
    return getattr(kind, "__torch_dispatch__", plain) is not plain
