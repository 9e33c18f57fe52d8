"""Access to the compiled module ``_native``, or the reason why it is missing."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType

from torch import Tensor
from torch.compiler import is_compiling

from oprd_kernels.backends.protocol import BackendUnavailable
from oprd_kernels.call import GradCall, LossCall

_BUILD_REPORT = Path(__file__).with_name("_build_report.json")


def _import_native() -> tuple[ModuleType | None, str]:
    """Return the native module, or None and the reason why it can't be used.

    torch must be imported first, so that both use one OpenMP runtime.
    """
    try:
        native = importlib.import_module("oprd_kernels._native")
    except ImportError as error:
        return None, build_report().get("native") or str(error)
    fields = getattr(native, "LOSS_FIELDS", None), getattr(native, "GRAD_FIELDS", None)
    if fields != (LossCall._fields, GradCall._fields):
        return None, "the native module was built for another version of oprd"
    return native, ""


def build_report() -> dict[str, str | None]:
    """Return the record of setup.py: for each part the reason why it was not built, or None."""
    return json.loads(_BUILD_REPORT.read_text()) if _BUILD_REPORT.exists() else {}


OWN_FRAMES = ("oprd", "oprd_kernels", "importlib", "runpy")
COMPILER = "a C++17 compiler (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install)"

_module, _reason = _import_native()


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        BackendUnavailable: If the module was not built. The message gives the reason and the fix.
    """
    if _module is None:
        raise BackendUnavailable(problem())
    return _module


def problem() -> str | None:
    """Return why the native CPU kernels are missing and how to fix that, or None if they exist."""
    if _module is not None:
        return None
    return (
        f"the native CPU kernels are not installed ({_reason}). Install {COMPILER} and reinstall "
        "oprd with pip."
    )


def need_no_check(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> int:
    """Check layers without projectors for `oprd_kernels.validate`, in a tenth of its time.

    Only ordinary calls pass. `validate` has to check everything else, valid or not.

    Returns:
        0 if `validate` has to check the layers itself; 1 if all layers are valid as given and
        alike; 2 if, in addition, student and teacher have the same number of rows.
    """
    if _module is None or is_compiling():
        return 0
    return _module.need_no_check(students, teachers)


def cuda_problem() -> str | None:
    """Return why the native module has no CUDA kernels and how to fix that, or None if it does."""
    if _module is None:
        return (
            f"the CUDA kernels are not installed: the native module, which would hold them, is "
            f"missing ({_reason}). Install {COMPILER} and the CUDA toolkit, so that nvcc is on "
            "PATH, and reinstall oprd with pip"
        )
    if hasattr(module(), "cuda_forward"):
        return None
    reason = build_report().get("cuda") or "this build has none"
    return (
        f"the CUDA kernels are not installed ({reason}). Install the CUDA toolkit, so that nvcc is "
        "on PATH, and reinstall oprd with pip"
    )


def _warn_user(message: str) -> None:
    """Warn at the line of the user's code that has led here, be it by way of oprd."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in OWN_FRAMES:
        frame = frame.f_back
    if frame is None:
        return warnings.warn(message, stacklevel=2)
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__")
    file = frame.f_code.co_filename
    warnings.warn_explicit(message, UserWarning, file, frame.f_lineno, name, registry)


if _module is None:
    _warn_user(f"oprd_kernels: {problem()} Until then oprd uses the slower PyTorch reference.")
