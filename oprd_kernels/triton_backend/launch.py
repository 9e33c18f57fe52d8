"""Launches Triton kernels with little work on the host.

Triton's own launcher looks at every argument anew: what it is, how it is aligned, whether that
means another compiled kernel. That takes tens of microseconds. Here a kernel's parameters are all
pointers, then scalars that are not specialised, then constants; so the constants, the pointers'
dtypes and their alignment name the compiled kernel, and it is called with plain addresses.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

Pointer = Tensor | tuple[Tensor, ...] | None

DIRECT_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Triton releases whose compiled kernels are known to take what `Kernel` gives them."""
DIRECT = (
    triton.__version__.rpartition(".")[0] in DIRECT_VERSIONS
    and torch.version.hip is None
    and not triton.knobs.runtime.interpret
)


def launches_are_watched() -> bool:
    """Whether a profiler has asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    return _has_hooks(runtime.launch_enter_hook) or _has_hooks(runtime.launch_exit_hook)


def _has_hooks(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


class Kernel:
    """A kernel to launch.

    Args:
        fn: the ``triton.jit`` function.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._ready: dict[tuple, tuple] = {}
        params = fn.params if DIRECT else ()
        self._alignment = [0 if p.do_not_specialize_on_alignment else 15 for p in params]

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        pointers: tuple[Pointer, ...],
        scalars: tuple[int, ...],
        constants: tuple,
        warps: int,
        stages: int = 1,
    ) -> None:
        """Launch on the current stream of ``device``; arguments in the order of the parameters."""
        if not DIRECT or device.type != "cuda" or launches_are_watched():
            with _current(device):
                self._by_triton(grid, pointers, scalars, constants, warps, stages)
            return
        addresses: list[Any] = []
        dtypes: list[Any] = []
        bits = 0
        for pointer, alignment in zip(pointers, self._alignment, strict=False):
            if pointer is None:
                addresses.append(None)
                dtypes.append(None)
            elif type(pointer) is tuple:
                several = tuple([x.data_ptr() for x in pointer])
                for address in several:
                    bits |= address & alignment
                addresses.append(several)
                dtypes.append((pointer[0].dtype, len(several)))
            else:
                address = pointer.data_ptr()
                bits |= address & alignment
                addresses.append(address)
                dtypes.append(pointer.dtype)
        if bits or max(scalars) >= 2**31:  # rare, and another kernel: Triton knows which
            with _current(device):
                self._by_triton(grid, pointers, scalars, constants, warps, stages)
            return
        index = device.index
        key = (index, warps, stages, constants, *dtypes)
        ready = self._ready.get(key)
        if ready is None:
            with _current(device):
                kernel = self._by_triton(grid, pointers, scalars, constants, warps, stages)
            if kernel is not None and kernel.run is not None:
                self._ready[key] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = ready
        stream = torch._C._cuda_getCurrentRawStream(index)
        if torch._C._cuda_getDevice() == index:
            run(*grid, stream, function, metadata, None, None, None,
                *addresses, *scalars, *constants)  # fmt: skip
        else:
            with torch.cuda.device(index):
                run(*grid, stream, function, metadata, None, None, None,
                    *addresses, *scalars, *constants)  # fmt: skip

    def _by_triton(self, grid, pointers, scalars, constants, warps, stages) -> Any:
        return self.fn[grid](
            *pointers, *scalars, *constants,
            num_warps=warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
