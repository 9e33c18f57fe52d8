"""Which implementations can run here, and for those that cannot, why."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from oprd_kernels.validate import Inputs

_BUILD_REPORT = Path(__file__).with_name("_build_report.json")


def _import_native() -> tuple[ModuleType | None, str]:
    """The native module, or why it is not there. After torch: both then use one OpenMP runtime."""
    try:
        return importlib.import_module("oprd_kernels._native"), ""
    except ImportError as error:
        reason = str(error)
    return None, _build_report().get("native") or reason


def _build_report() -> dict[str, str | None]:
    """What setup.py recorded: why a part was not built, or None."""
    return json.loads(_BUILD_REPORT.read_text()) if _BUILD_REPORT.exists() else {}


def cuda_build_problem() -> str:
    """Why the native module has no CUDA kernels."""
    return _build_report().get("cuda") or "this build has none"


_native, _reason = _import_native()

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In the order ``backend="auto"`` prefers them."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here, or not this call."""


def native() -> ModuleType:
    """The compiled module.

    Raises:
        BackendUnavailable: if it was not built, with the reason and the fix.
    """
    if _native is None:
        raise BackendUnavailable(native_problem())
    return _native


def native_problem() -> str | None:
    """Why the native CPU kernels are missing and what to do about it; None if they are there."""
    if _native is not None:
        return None
    return (
        f"the native CPU kernels are not installed ({_reason}). Install a C++17 compiler "
        "(Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install) and reinstall oprd "
        "with pip."
    )


@functools.cache
def launcher(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward_``, ``forward_layers`` and ``backward_layers_`` run
    a fused backend's kernels."""
    return importlib.import_module(f"oprd_kernels.{_LAUNCHERS[backend]}")


_LAUNCHERS = {"cuda": "cuda", "triton": "triton_backend", "cpu": "cpu"}


def _cpu_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend takes tensors on the CPU, not on {device}"
    return native_problem()


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` can't work on tensors of ``device``; None if it can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return None
    if backend == "cpu":
        return _cpu_problem(device)
    return launcher(backend).unavailable(device)


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


def _cuda_unsupported(inputs: Inputs) -> str | None:
    from oprd_kernels import cuda  # not by `launcher`, which torch.compile can't trace

    return cuda.unsupported(inputs)


def choose(backend: str, inputs: Inputs, double: bool) -> str:
    """The backend to use: the one named, or the first of BACKENDS that can do this call.

    Args:
        double: whether any input is float64 (gradcheck, oracles), which the reference computes.

    Raises:
        BackendUnavailable: if the one named can't run, or can't do this call, with the reason.
        ValueError: if there is no backend of that name.
    """
    device = inputs.student.device
    if backend == "auto":
        if double:
            return "reference"
        if device.type == "cpu":
            return "reference" if _native is None else "cpu"
        return _choose_gpu(device, inputs)
    reason = unavailable(backend, device)
    if reason is None and backend != "reference":
        if double:
            reason = "it takes float32, bfloat16 and float16 tensors, not float64; use 'reference'"
        elif backend == "cuda":
            reason = _cuda_unsupported(inputs)
    if reason:
        raise BackendUnavailable(f"backend={backend!r} can't run: {reason}")
    return backend


def _choose_gpu(device: torch.device, inputs: Inputs) -> str:
    reasons = []
    for name in ("cuda", "triton"):
        reason = unavailable(name, device)
        if reason is None and name == "cuda":
            reason = _cuda_unsupported(inputs)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}.")
    _warn_reference(device.type, " ".join(reasons))
    return "reference"


if _native is None:
    warnings.warn(
        f"oprd_kernels: {native_problem()} Until then the slower PyTorch reference is used.",
        stacklevel=2,
    )
