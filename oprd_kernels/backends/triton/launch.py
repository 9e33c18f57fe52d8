"""Launches Triton kernels with little work on the host.

Triton's own launcher looks at every argument anew: what it is, how it is aligned, whether that
means another compiled kernel. That takes tens of microseconds. Here a kernel's parameters are all
pointers, then scalars that are not specialised, then constants; so the constants, the pointers'
dtypes and their alignment name the compiled kernel, and it is called with plain addresses.
`tests.kernels.test_triton_launch` compares what the driver gets either way.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

Pointer = Tensor | tuple[Tensor, ...] | None

DIRECT_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Triton releases whose compiled kernels take what `Launch` gives them: 3.6 and 3.9 by test, those
between by reading."""
PACKED_VERSIONS = ("3.9",)
"""Of these, those whose native launcher is known to take what `_ready` gives it, so that the Python
around it, which allocates scratch memory for kernels that need some, can be left out too."""
DIRECT = (
    triton.__version__.rpartition(".")[0] in DIRECT_VERSIONS
    and torch.version.hip is None
    and not triton.knobs.runtime.interpret
)


_RUNTIME = triton.knobs.runtime
# Of a torch built for GPUs.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


def launches_are_watched() -> bool:
    """Whether a profiler has asked Triton to be told of launches."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return (enter is not None and bool(getattr(enter, "calls", True))) or (
        leave is not None and bool(getattr(leave, "calls", True))
    )


class Kernel:
    """A kernel to launch.

    Args:
        fn: the ``triton.jit`` function.

    Attributes:
        ready: by constants, warps and stages, and then by what `Launch` finds of the pointers:
            a compiled kernel.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.ready: dict[tuple, dict[tuple, _Ready]] = {}

    def misaligned(self, addresses: list[Any]) -> bool:
        """Whether an address makes another kernel than one that is a multiple of 16 bytes."""
        for param, address in zip(self.fn.params, addresses, strict=False):
            if address is not None and not param.do_not_specialize_on_alignment:
                several = address if type(address) is tuple else (address,)
                if any(one % 16 for one in several):
                    return True
        return False


class _Ready(NamedTuple):
    """A compiled kernel, as it is called: grid, stream, ``options``, arguments."""

    run: Any
    options: tuple
    packed: bool  # whether the arguments are one tuple
    kernel: Any  # held, as it unloads its code when nobody does


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
    """All of a launch but where its tensors are: to be kept for calls of the same shapes.

    Args:
        kernel: what to launch.
        grid: programs.
        scalars: parameters after the pointers, in order.
        constants: parameters after the scalars, in order.
        warps: of a program.
        stages: of its loops.
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
        self._fits = DIRECT and max(scalars) < 2**31  # larger ones make another kernel
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
        if bits & 15 and self._kernel.misaligned(addresses):  # another kernel: Triton knows which
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
