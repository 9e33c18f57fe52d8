"""The CUDA kernels without a GPU: the same sources, compiled for the host (csrc/cuda/emulation),
behind the cuda backend.

Every access is checked: a data race, an access outside the tensors passed, a read of what nobody
wrote raise RuntimeError. What a launch may touch is read off the call, here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from torch import Tensor

from oprd_kernels.backends import cuda
from oprd_kernels.call import GradCall, LossCall

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "c++")

Memory = tuple[str, str, Tensor | None]
"""The kind it is counted as, "r", "w" or "rw", and the tensor."""


def missing_tools() -> list[str]:
    """What of TOOLS is not on PATH."""
    return [tool for tool in TOOLS if not shutil.which(tool)]


def build(directory: Path) -> ModuleType:
    """The module ``_emulated``, built in ``directory``, where it is kept."""
    import pybind11

    configure = [
        *("cmake", "-GNinja", "-S", ROOT, "-B", directory, "-DOPRD_CUDA_EMULATION=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={directory}/module",
    ]
    with FileLock(directory / ".lock"):  # of pytest-xdist's workers, one builds
        for command in (configure, ["cmake", "--build", directory]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (directory / "module").glob("_emulated*")
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(module: ModuleType) -> None:
    """The cuda backend takes tensors on the CPU from here on."""
    cuda.BACKEND.machine = cuda.Machine("cpu", Kernels(module), lambda _index: 0)


class Kernels:
    """The native module's functions for CUDA, each allowed what its arguments say it may touch."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.cuda_scratch = module.cuda_scratch

    def cuda_forward(
        self,
        calls: Sequence[LossCall],
        grad: Tensor | None,
        loss: Tensor,
        saved: Tensor,
        scratch: Tensor | None,
        *where: int,
    ) -> None:
        """Reads the calls, writes the rest."""
        first = calls[0]
        shared = (first.rows, first.teacher_rows, first.weights, first.denominator)
        # Sums and projectors' terms lie in it: accesses of different sizes.
        bits = None if scratch is None else scratch.view(torch.int16)
        found: list[Memory] = [("rows", "w", x) for x in (saved, loss, bits)]
        found += [("rows", "r", x) for x in shared]
        for call in calls:
            found.append(("activations", "r", call.student))
            found.append(("activations", "rw" if grad is call.teacher else "r", call.teacher))
            projectors = (call.student_proj, call.teacher_proj, call.teacher_mean)
            found += [("projectors", "r", x) for x in projectors]
        if grad is not first.teacher:
            found.append(("activations", "w", grad))
        self._allow(found)
        self.module.cuda_forward(calls, grad, loss, saved, scratch, *where)

    def cuda_backward(
        self,
        calls: Sequence[GradCall],
        grads: Sequence[Tensor],
        accumulate: bool,
        grad_losses: Tensor,
        *where: int,
    ) -> None:
        """Reads the calls, writes the gradients."""
        first = calls[0]
        shared = (first.rows, first.teacher_rows, first.weights, grad_losses)
        found: list[Memory] = [("rows", "r", x) for x in shared]
        found += [("activations", "rw" if accumulate else "w", grad) for grad in grads]
        for call in calls:
            found.append(("rows", "r", call.saved))
            found += [("activations", "r", x) for x in (call.student, call.teacher)]
            found.append(("projectors", "r", call.student_proj))
        self._allow(found)
        self.module.cuda_backward(calls, grads, accumulate, grad_losses, *where)

    def _allow(self, memory: Sequence[Memory]) -> None:
        self.module.allow(
            [
                (kind, mode, x.data_ptr(), x.element_size(), x.shape, x.stride())
                for kind, mode, x in memory
                if x is not None
            ]
        )
