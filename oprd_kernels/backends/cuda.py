"""Launches the CUDA C++ kernels on calls that `oprd_kernels.validate` has accepted.

They run on the current stream of the tensors' device, allocate nothing and never wait for the
device: a call may be captured in a CUDA graph. What they do not do (`CudaBackend.unsupported`:
dtypes in a mix, a last stride other than 1, a rank above 16) the Triton backend does.
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
"""As csrc/rep_loss.h has them."""
MAX_RANK = 16
"""Larger products are for tensor cores, which the Triton kernels use."""


class Machine(NamedTuple):
    """What the kernels run on. Tests put an emulation in a GPU's place (`CudaBackend.machine`)."""

    device_type: str
    kernels: Any  # cuda_forward, cuda_backward and cuda_scratch of the native module
    current_stream: Callable[[int], int]  # of a device index, as an address


@functools.cache
def gpu() -> Machine:
    """The native module's kernels on NVIDIA GPUs."""
    # As torch's own generated code has it: torch.cuda.current_stream() makes an object.
    return Machine("cuda", native.module(), torch._C._cuda_getCurrentRawStream)


@functools.cache
def installation_problem() -> str | None:
    """Why the CUDA kernels can't be used on this machine at all; None if they can."""
    if reason := native.cuda_problem():
        return reason
    runtime, driver, problem = native.module().cuda_facts()
    if not problem:
        return None
    versions = f"built with CUDA {version_name(runtime)}, driver for {version_name(driver)}"
    return f"{problem} ({versions})"


def version_name(number: int) -> str:
    """CUDA's 12080 as "12.8"; 0 is what a machine without a driver has."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    # "80,90", as csrc/cuda/architectures.cmake has it; of "90a" the number, whoever built that.
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
    """See `protocol.Backend`. A launch that fails raises a RuntimeError that names the
    kernel, the shape and what CUDA says."""

    name = "cuda"
    machine: Machine | None = None
    """In place of `gpu`."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why not, on tensors of ``device``."""
        if self.machine is not None and device.type == self.machine.device_type:
            return None
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the cuda backend takes tensors on an NVIDIA GPU, not on {device}"
        return installation_problem() or _capability_problem(device)

    def unsupported(self, call: LossCall) -> str | None:
        """Why this is a call for another backend."""
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
        """Loss and ``saved``."""
        loss, saved = new_outputs(call, self.saved_size(call))
        self._forward((call,), grad, loss, saved)
        return loss, saved

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """``grad`` has the student's dtype."""
        if not _has_dense_rows(grad):  # what flows through a tap has whatever strides it comes with
            dense = grad.contiguous()
            self._backward((call,), (dense,), accumulate, grad_loss)
            grad.copy_(dense)
        else:
            self._backward((call,), (grad,), accumulate, grad_loss)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """One call of the native code."""
        losses, saved = new_layers(calls[0], len(calls), self.saved_size(calls[0]))
        self._forward(calls, None, losses, saved)
        return losses, saved

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """One call of the native code."""
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
    """Doubles that forward works in: the sums of parts of the rows, and projectors' terms."""
    first = calls[0]
    student, rank = first.student, first.rank
    if not rank:
        return cuda_scratch(first.num_rows, len(calls), 0, 0, 0, DTYPE_CODES[student.dtype])
    widths = [max([x.shape[-1] for x in column]) for column in list(zip(*calls, strict=True))[:2]]
    if first.teacher_proj is None:
        widths[1] = 0
    code = DTYPE_CODES[student.dtype]
    return cuda_scratch(first.num_rows, len(calls), rank, *widths, code)


BACKEND = CudaBackend()
