"""The CUDA backend, which launches the CUDA C++ kernels on validated calls.

The kernels run on the current stream of the tensors' device. They allocate nothing and never wait
for the device, so a call can be captured in a CUDA graph. They do not support mixed dtypes, a last
stride other than 1, or a rank above 16 (`CudaBackend.unsupported`). The Triton backend does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oprd_kernels import native
from oprd_kernels.call import GradCall, LossCall
from oprd_kernels.saved_buffer import RowsLayout, new_layers, new_outputs

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The values of DType in csrc/rep_loss.h."""
MAX_RANK = 16
"""The largest supported rank. Above it, the Triton backend's tensor-core kernels are used."""


class Machine(NamedTuple):
    """The device and native functions that `CudaBackend` uses.

    Tests set `CudaBackend.machine` to an emulation.
    """

    device_type: str
    kernels: Any  # cuda_forward, cuda_backward and cuda_scratch of the native module
    current_stream: Callable[[int], int]  # of a device index, as an address


@functools.cache
def gpu() -> Machine:
    """Return the native module's kernels on NVIDIA GPUs."""
    # torch's generated code uses this function too; torch.cuda.current_stream() makes an object.
    return Machine("cuda", native.module(), torch._C._cuda_getCurrentRawStream)


@functools.cache
def installation_problem() -> str | None:
    """Return why this machine can't run the CUDA kernels at all, or None if it can."""
    if reason := native.cuda_problem():
        return reason
    runtime, driver, problem = native.module().cuda_facts()
    if not problem:
        return None
    versions = f"built with CUDA {version_name(runtime)}, driver for {version_name(driver)}"
    return f"{problem} ({versions})"


def version_name(number: int) -> str:
    """Format a CUDA version number: 12080 is "12.8", and 0 (no driver) is "none"."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    # The format is "80,90" (csrc/cuda/architectures.cmake). The suffix of "90a" is ignored.
    built_for = re.findall(r"\d+", native.module().cuda_architectures.replace(".", ""))
    oldest = min(map(int, built_for), default=0)
    if major * 10 + minor >= oldest:
        return None
    return (
        f"{device} has compute capability {major}.{minor}, the CUDA kernels are built for "
        f"{oldest // 10}.{oldest % 10} and later"
    )


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


class CudaBackend(RowsLayout):
    """The CUDA C++ kernels; see `protocol.Backend` for the methods.

    A failed launch raises a RuntimeError with the kernel, the shape and CUDA's error message.
    """

    name = "cuda"
    machine: Machine | None = None
    """Replaces `gpu` in tests."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this backend can't run on ``device``, or None if it can."""
        if self.machine is not None and device.type == self.machine.device_type:
            return None
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the cuda backend takes tensors on an NVIDIA GPU, not on {device}"
        return installation_problem() or _capability_problem(device)

    def unsupported(self, call: LossCall) -> str | None:
        """Return why this backend does not support ``call``, or None if it does."""
        student, teacher = call.student, call.teacher
        if student.dtype is not teacher.dtype:
            return (
                f"student is {student.dtype} and teacher {teacher.dtype}: it takes one dtype a call"
            )
        for name, x in (("student", student), ("teacher", teacher)):
            if not _has_dense_rows(x):
                return f"{name} has strides {x.stride()}: it takes rows whose last stride is 1"
        if call.rank > MAX_RANK:
            return f"the rank is {call.rank}: it projects to {MAX_RANK} dimensions at most"
        return None

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and ``saved``."""
        loss, saved = new_outputs(call, self.saved_size(call))
        self._forward((call,), grad, loss, saved)
        return loss, saved

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Write or add the gradient of the student; ``grad`` has the student's dtype."""
        if not _has_dense_rows(grad):  # the gradient that reaches a tap may have any strides
            dense = grad.contiguous()
            self._backward((call,), (dense,), accumulate, grad_loss)
            grad.copy_(dense)
        else:
            self._backward((call,), (grad,), accumulate, grad_loss)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """Return the losses and ``saved``, from one call of the native code."""
        losses, saved = new_layers(calls[0], len(calls), self.saved_size(calls[0]))
        self._forward(calls, None, losses, saved)
        return losses, saved

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Write the gradients of all students, in one call of the native code."""
        self._backward(calls, grads, False, grad_losses)

    def _forward(
        self, calls: Sequence[LossCall], grad: Tensor | None, loss: Tensor, saved: Tensor
    ) -> None:
        machine = self.machine or gpu()
        size = _scratch_size(machine.kernels.cuda_scratch, calls)
        scratch = saved.new_empty(size, dtype=torch.float64) if size else None
        index = saved.get_device()
        stream = machine.current_stream(index)
        machine.kernels.cuda_forward(calls, grad, loss, saved, scratch, index, stream)

    def _backward(
        self,
        calls: Sequence[GradCall],
        grads: Sequence[Tensor],
        accumulate: bool,
        grad_losses: Tensor,
    ) -> None:
        machine = self.machine or gpu()
        index = grads[0].get_device()
        stream = machine.current_stream(index)
        machine.kernels.cuda_backward(calls, grads, accumulate, grad_losses, index, stream)


def _scratch_size(cuda_scratch: Any, calls: Sequence[LossCall]) -> int:
    """Return the number of doubles of scratch that forward needs.

    The scratch holds partial sums over the rows and the terms of the projectors.
    """
    first = calls[0]
    m, layers, rank, code = first.num_rows, len(calls), first.rank, DTYPE_CODES[first.student.dtype]
    if not rank:
        return cuda_scratch(m, layers, 0, 0, 0, code)
    width = max([call.student.shape[-1] for call in calls])
    teacher_width = 0
    if first.teacher_proj is not None:
        teacher_width = max([call.teacher.shape[-1] for call in calls])
    return cuda_scratch(m, layers, rank, width, teacher_width, code)


BACKEND = CudaBackend()
