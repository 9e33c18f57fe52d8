"""Which implementations can run here, and for those that cannot, why."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import torch

_BUILD_REPORT = Path(__file__).with_name("_build_report.json")


def _import_native() -> tuple[ModuleType | None, str]:
    """The native module, or why it is not there. After torch: both then use one OpenMP runtime."""
    try:
        return importlib.import_module("oprd_kernels._native"), ""
    except ImportError as error:
        reason = str(error)
    if _BUILD_REPORT.exists():  # written by setup.py
        reason = json.loads(_BUILD_REPORT.read_text())["native"] or reason
    return None, reason


_native, _reason = _import_native()

BACKENDS = ("cpu", "reference")
"""In the order ``backend="auto"`` prefers them."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here."""


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


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` can't work on tensors of ``device``; None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"the cpu backend takes tensors on the CPU, not on {device}"
        return native_problem()
    raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")


@functools.cache
def _warn_reference(device_type: str) -> None:
    if device_type != "cpu":
        warnings.warn(
            f"oprd_kernels {device_type} tensors: this version has no fused kernel for that "
            "device, the plain PyTorch reference is used. backend='reference' silences this.",
            stacklevel=4,
        )


def choose(backend: str, student: torch.Tensor, double: bool = False) -> str:
    """The backend to use: the one named, or the first of BACKENDS that can work on ``student``.

    Args:
        double: whether any input is float64 (gradcheck, oracles), which the reference computes.

    Raises:
        BackendUnavailable: if the one named can't run, with the reason.
        ValueError: if there is no backend of that name.
    """
    if backend == "auto":
        if double:
            return "reference"
        if _native is not None and student.is_cpu:
            return "cpu"
        _warn_reference(student.device.type)
        return "reference"
    if reason := unavailable(backend, student.device):
        raise BackendUnavailable(f"backend={backend!r} can't run: {reason}")
    if backend != "reference" and double:
        raise BackendUnavailable(
            f"backend={backend!r} takes float32, bfloat16 and float16 tensors, not float64; use "
            "backend='reference' or 'auto'"
        )
    return backend


if _native is None:
    warnings.warn(
        f"oprd_kernels: {native_problem()} Until then the slower PyTorch reference is used.",
        stacklevel=2,
    )
