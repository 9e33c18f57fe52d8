"""The compiled module, or why it is not there."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torch import Tensor
from torch.compiler import is_compiling

from oprd_kernels.backends.protocol import BackendUnavailable
from oprd_kernels.call import GradCall, LossCall

_BUILD_REPORT = Path(__file__).with_name("_build_report.json")


def _import_native() -> tuple[ModuleType | None, str]:
    """The native module, or why it can't be used. After torch: both then use one OpenMP runtime."""
    try:
        found = importlib.import_module("oprd_kernels._native")
    except ImportError as error:
        return None, build_report().get("native") or str(error)
    fields = getattr(found, "LOSS_FIELDS", None), getattr(found, "GRAD_FIELDS", None)
    if fields != (LossCall._fields, GradCall._fields):
        return None, "the native module was built for another version of oprd"
    return found, ""


def build_report() -> dict[str, str | None]:
    """What setup.py recorded: why a part was not built, or None."""
    return json.loads(_BUILD_REPORT.read_text()) if _BUILD_REPORT.exists() else {}


_module, _reason = _import_native()


def module() -> ModuleType:
    """The compiled module.

    Raises:
        BackendUnavailable: if it was not built, with the reason and the fix.
    """
    if _module is None:
        raise BackendUnavailable(problem())
    return _module


def problem() -> str | None:
    """Why the native CPU kernels are missing and what to do about it; None if they are there."""
    if _module is not None:
        return None
    return (
        f"the native CPU kernels are not installed ({_reason}). Install a C++17 compiler "
        "(Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install) and reinstall oprd "
        "with pip."
    )


def need_no_check(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> int:
    """Whether `oprd_kernels.validate` would take these layers, which have no projectors, as they
    are. 0: it has to look itself. 1: yes, and they are alike. 2: and each pair has as many rows.

    The checks it makes of ordinary calls, in a tenth of the time; whatever is out of the ordinary,
    wrong or not, is left to it.
    """
    if _module is None or is_compiling():
        return 0
    return _module.need_no_check(students, teachers)


def cuda_problem() -> str | None:
    """Why the native module has no CUDA kernels and what to do about it; None if it has."""
    if reason := problem():
        return reason
    if hasattr(module(), "cuda_forward"):
        return None
    reason = build_report().get("cuda") or "this build has none"
    return (
        f"the CUDA kernels are not installed ({reason}). Install the CUDA toolkit, so that nvcc is "
        "on PATH, and reinstall oprd with pip"
    )


if _module is None:
    warnings.warn(
        f"oprd_kernels: {problem()} Until then the slower PyTorch reference is used.",
        stacklevel=2,
    )
