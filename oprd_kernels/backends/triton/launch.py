"""Launches of Triton kernels with little work on the host.

At each launch, Triton's own launcher inspects the type and the alignment of every argument to
select a compiled kernel. That takes tens of microseconds. The kernels here take pointers, then
scalars that are not specialised, then constants. The constants, the dtypes of the pointers and
their alignment therefore identify the compiled kernel, which is called with plain addresses.
`tests.kernels.test_triton_launch` checks that the driver receives the same from both launchers.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

Pointer = Tensor | tuple[Tensor, ...] | None

DIRECT_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Triton releases whose compiled kernels accept the arguments of `Launch`. 3.6 and 3.9 were tested;
the source of the releases between them was read."""
PACKED_VERSIONS = ("3.9",)
"""The releases of DIRECT_VERSIONS whose native launcher accepts the arguments of `_ready`. There,
Triton's Python wrapper, which allocates scratch memory for kernels that need it, is skipped too."""
DIRECT = (
    triton.__version__.rpartition(".")[0] in DIRECT_VERSIONS
    and torch.version.hip is None
    and not triton.knobs.runtime.interpret
)


_RUNTIME = triton.knobs.runtime
# These functions exist only in a torch built for GPUs.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


def launches_are_watched() -> bool:
    """Return whether a profiler has registered hooks for Triton launches."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return (enter is not None and bool(getattr(enter, "calls", True))) or (
        leave is not None and bool(getattr(leave, "calls", True))
    )


class Kernel:
    """A Triton kernel and its compiled variants.

    Args:
        fn: The ``triton.jit`` function.

    Attributes:
        ready: The compiled kernels. The first key is (constants, warps, stages). The second key
            holds the device index and the dtypes of the pointers.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.ready: dict[tuple, dict[tuple, _Ready]] = {}

    def misaligned(self, addresses: list[Any]) -> bool:
        """Return whether an address needs another kernel because it is not a multiple of 16."""
        for param, address in zip(self.fn.params, addresses, strict=False):
            if address is not None and not param.do_not_specialize_on_alignment:
                several = address if type(address) is tuple else (address,)
                if any(one % 16 for one in several):
                    return True
        return False


class _Ready(NamedTuple):
    """A compiled kernel. ``run`` takes the grid, the stream, ``options`` and the arguments."""

    run: Any
    options: tuple
    packed: bool  # whether the arguments are one tuple
    kernel: Any  # kept alive, because its code is unloaded when it is freed


def _ready(kernel: Any) -> _Ready:
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    if triton.__version__.rpartition(".")[0] in PACKED_VERSIONS and (
        run.global_scratch_size == run.profile_scratch_size == run.gsan_enabled == 0
    ):
        hooks_and_scratch = (None,) * 5
        options = (
            function, run.launch_cooperative_grid, run.launch_pdl, metadata, *hooks_and_scratch,
            run.arg_annotations, run.kernel_signature,
        )  # fmt: skip
        return _Ready(run.launch, options, True, kernel)
    return _Ready(run, (function, metadata, None, None, None), False, kernel)


class Launch:
    """A launch without the addresses of its tensors, reusable for calls of the same shapes.

    Args:
        kernel: The kernel to launch.
        grid: The number of programs in each dimension.
        scalars: The parameters after the pointers, in order.
        constants: The parameters after the scalars, in order.
        warps: The number of warps of a program.
        stages: The number of pipeline stages of its loops.
    """

    __slots__ = (
        "_constants", "_fits", "_grid", "_kernel", "_numbers", "_options", "_ready",
        "_scalars",
    )  # fmt: skip

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], scalars: tuple[int, ...],
        constants: tuple, warps: int, stages: int = 1,
    ) -> None:  # fmt: skip
        self._kernel, self._grid, self._scalars, self._constants = kernel, grid, scalars, constants
        self._options = warps, stages
        self._numbers = (*scalars, *constants)
        self._fits = DIRECT and max(scalars) < 2**31  # larger scalars need another kernel
        self._ready = kernel.ready.setdefault((constants, warps, stages), {})

    def __call__(self, device: torch.device, pointers: tuple[Pointer, ...]) -> None:
        """Launch on the current stream of ``device``."""
        index = device.index
        if not self._fits or index is None or launches_are_watched():
            self._by_triton(device, pointers)
            return
        addresses: list[Any] = []
        key: list[Any] = [index]
        bits = 0
        pointer: Any
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                key.append(None)
            elif type(pointer) is tuple:
                several = tuple([x.data_ptr() for x in pointer])
                for address in several:
                    bits |= address
                addresses.append(several)
                key.append(pointer[0].dtype)
                key.append(len(several))
            else:
                address = pointer.data_ptr()
                bits |= address
                addresses.append(address)
                key.append(pointer.dtype)
        if bits & 15 and self._kernel.misaligned(addresses):  # Triton selects the other kernel
            self._by_triton(device, pointers)
            return
        pattern = tuple(key)
        ready = self._ready.get(pattern)
        if ready is None:
            kernel = self._by_triton(device, pointers)
            if kernel is not None and kernel.run is not None:
                self._ready[pattern] = _ready(kernel)
            return
        run, options, packed, _ = ready
        arguments: tuple = (*addresses, *self._numbers)
        if packed:
            arguments = (arguments,)
        stream = _current_stream(index)
        if _current_device() == index:
            run(*self._grid, stream, *options, *arguments)
        else:
            with torch.cuda.device(index):
                run(*self._grid, stream, *options, *arguments)

    def _by_triton(self, device: torch.device, pointers: tuple[Pointer, ...]) -> Any:
        warps, stages = self._options
        with _current(device):
            return self._kernel.fn[self._grid](
                *pointers, *self._scalars, *self._constants,
                num_warps=warps, num_stages=stages, enable_fp_fusion=False,
            )  # fmt: skip


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
