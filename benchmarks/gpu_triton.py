"""Compiles what the Triton backend would launch, for GPUs that are not there.

The launcher itself is run on tensors of the real widths and types, with Triton told that the active
device is the target and every launch stopped after compilation: so what is compiled is what would
run, specialisations included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu_code import Code, read_amdgcn, read_cubin
from oprd_kernels.backends import triton as triton_backend
from oprd_kernels.backends.triton import backend
from oprd_kernels.call import GradCall, LossCall

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 64


@dataclass(frozen=True)
class Case:
    """One specialisation: what a call launches. ``rank`` 0: rows compared as they are."""

    dtype: str
    width: int
    rank: int = 0
    inplace: bool = False
    few_rows: bool = False
    trains_proj: bool = False

    def __str__(self) -> str:
        mode = f"r={self.rank}" if self.rank else "in place" if self.inplace else "identity"
        return (
            f"{mode} d={self.width} {self.dtype}"
            + (" few rows" if self.few_rows else "")
            + (" P trained" if self.trains_proj else "")
        )


# One of every configuration in `oprd_kernels.backends.triton.configs`, in every type that changes
# the code.
CASES = [
    *(Case(dtype, 1536) for dtype in DTYPES),
    *(Case(dtype, 4096, inplace=True) for dtype in ("fp32", "bf16")),
    Case("bf16", 512),
    Case("bf16", 8192),
    Case("fp32", 16384),
    Case("fp32", 16384, inplace=True),
    Case("fp32", 32768, inplace=True),
    *(Case(dtype, 2048, r) for dtype in ("fp32", "bf16") for r in (8, 32, 64, 128, 256)),
    *(Case("fp16", 2048, r) for r in (8, 64)),
    *(Case("bf16", 2048, r, few_rows=True) for r in (8, 64)),
    *(Case(dtype, 2048, 64, trains_proj=True) for dtype in DTYPES),
]


class _Driver:
    """The device that Triton is to compile for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compile_only(arch: str, busy: bool = True) -> Iterator[list[Any]]:
    """Launches inside the block compile for ``arch`` and go no further; yields the kernels.

    Args:
        busy: whether the rows of the calls inside fill the chip.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    patches = (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", compile_instead),
        mock.patch.object(backend, "generation", return_value=arch),
        mock.patch.object(backend, "processors", return_value=1 if busy else 128),
    )
    with patches[0], patches[1], patches[2], patches[3]:
        yield compiled


def launch(case: Case) -> None:
    """Forward and backward (of a loss, and through a tap) of ``case``."""
    dtype = DTYPES[case.dtype]
    student, teacher = (torch.zeros(ROWS, case.width, dtype=dtype) for _ in range(2))
    projectors: list[torch.Tensor | None] = [None, None, None]
    if case.rank:
        projectors = [torch.zeros(case.rank, case.width) for _ in range(2)]
        projectors.append(torch.zeros(case.width))
    weights = torch.ones(ROWS)
    grad = teacher if case.inplace else None
    triton = triton_backend.BACKEND
    call = LossCall(student, teacher, *projectors, weights=weights)
    _, saved = triton.forward(call, grad)
    if case.inplace:
        return
    wide = (student if case.trains_proj else None, None) if case.rank else (student, teacher)
    back = GradCall(saved, *wide, projectors[0], weights=weights)
    for accumulate in (False, True):
        triton.backward_(back, torch.zeros_like(student), accumulate, torch.ones(()))
    if case.trains_proj:
        triton.grad_proj(back, torch.ones(()))


def compiled_code(case: Case, arch: str) -> list[Code]:
    """What the kernels of ``case`` come to on ``arch``."""
    if triton_backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    with compile_only(arch, busy=not case.few_rows) as kernels:
        launch(case)
    codes = []
    for kernel in kernels:
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        if arch.startswith("gfx"):
            codes.append(read_amdgcn(kernel.asm["amdgcn"], arch, warps, shared))
        else:
            codes += read_cubin(kernel.asm["cubin"], arch, warps, shared)
    return codes
