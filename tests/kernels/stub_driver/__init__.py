"""Triton's launcher on a CUDA driver that launches nothing, so that the host side of the Triton
backend runs, and can be timed, on a machine without a GPU.

`install` builds libcuda.c, has Triton's own CudaDriver load it, and lets the backend take tensors
on the CPU for a GPU's. To be called in a process of its own, without TRITON_INTERPRET and before
anything imports triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STREAM = 4096
"""The handle of the stream that is current."""
SIZES = {"i1": 4, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8}


def missing() -> str | None:
    """Why the stub can't be built here; None if it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"the driver is stubbed on Linux x86-64 only, not {sys.platform} on " + (
            platform.machine() or "an unknown machine"
        )
    if shutil.which("cc") is None:
        return "no C compiler: neither the stub nor Triton's launcher can be built"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


class _Record(ctypes.Structure):
    """As in libcuda.c."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("num_attributes", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("function", ctypes.c_ulonglong),
        ("num_params", ctypes.c_uint),
        ("params", ctypes.c_ulonglong * 256),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was given. ``params`` as the bits of unsigned numbers."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    params: tuple[int, ...]


def param_sizes(signature: Any) -> list[int]:
    """Bytes of each parameter of a kernel, in order; without those that Triton's launcher adds."""
    sizes: list[int] = []
    for kind in signature:
        if isinstance(kind, tuple):
            sizes += param_sizes(kind)
        elif kind != "constexpr":
            sizes.append(8 if kind.startswith("*") else SIZES[kind])
    return sizes


class Stub:
    """The stubbed driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stub_record.restype = ctypes.POINTER(_Record)
        library.stub_name.restype = ctypes.c_char_p
        library.stub_name.argtypes = (ctypes.c_ulonglong,)
        library.stub_expect.argtypes = (
            ctypes.c_ulonglong,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int),
        )

    def expect(self, function: int, sizes: list[int]) -> None:
        """Write down launches of ``function``, whose parameters have these sizes."""
        self._library.stub_expect(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    @property
    def num_launches(self) -> int:
        """Launches so far."""
        return self._library.stub_num_launches()

    def launches(self, call: Callable[[], Any]) -> list[Launch]:
        """What ``call`` launches."""
        self._library.stub_clear()
        call()
        found = []
        for n in range(self._library.stub_num_records()):
            record = self._library.stub_record(n).contents
            found.append(
                Launch(
                    self._library.stub_name(record.function).decode(),
                    record.function,
                    tuple(record.grid),
                    tuple(record.block),
                    record.shared,
                    record.num_attributes,
                    record.stream,
                    tuple(record.params[: record.num_params]),
                )
            )
        return found


def _build(folder: Path) -> ctypes.CDLL:
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    target = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda.c")
    options = ["-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run(["cc", *options, str(source), "-o", str(target)], check=True)
    (folder / "libcuda.so").symlink_to(target.name)
    # By its soname, what asks for libcuda.so.1 from now on gets this one.
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def install(folder: Path, record: bool, assemble: bool = False) -> Stub:
    """Put the stub, built in ``folder``, in the place of the driver.

    Args:
        record: write launches down, parameters and all; else they are only counted.
        assemble: run ptxas, whose result nobody reads here.
    """
    if os.environ.get("TRITON_INTERPRET") or "triton" in sys.modules:
        raise RuntimeError("the stub needs a process without TRITON_INTERPRET and Triton")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    stub = Stub(_build(folder))

    import torch
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    torch._C._cuda_getCurrentRawStream = lambda index: STREAM
    torch._C._cuda_getDevice = lambda: 0
    active: Any = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: STREAM
    active.set_current_device = lambda device: None
    active.get_device_capability = lambda device: (9, 0)

    if record:
        _record_launches(stub, active)
    driver.set_active(active)
    if not assemble:
        CUDABackend.make_cubin = lambda self, src, *_: src.encode()
    _take_cpu_tensors()
    return stub


def _record_launches(stub: Stub, active: Any) -> None:
    """A kernel's launcher is made, then its code loaded: the former knows the signature, the latter
    says which function it is. Launches are left alone."""
    load_binary = active.utils.load_binary
    made: list[list[int]] = []

    class Launcher(active.launcher_cls):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            made.append([*param_sizes(src.signature.values()), 8, 8])  # and two scratch buffers

    def load(*arguments):
        loaded = load_binary(*arguments)
        stub.expect(loaded[1], made.pop())
        return loaded

    active.launcher_cls, active.utils.load_binary = Launcher, load


def _take_cpu_tensors() -> None:
    import torch

    from oprd_kernels.backends.triton import backend, launch

    gpu = torch.device("cuda", 0)
    launch_on = launch.Launch.__call__
    launch._current = lambda device: contextlib.nullcontext()
    launch.Launch.__call__ = lambda self, device, pointers: launch_on(self, gpu, pointers)
    backend.generation = lambda device: "sm90"
    backend.processors = lambda device: 132
    backend.TritonBackend.unavailable = lambda self, device: None


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """Triton tells of launches, as it does for a profiler; their metadata gather in the list."""
    from triton import knobs

    seen: list[Any] = []
    chain = knobs.runtime.launch_enter_hook
    if hasattr(chain, "add"):
        chain.add(seen.append)
        try:
            yield seen
        finally:
            chain.remove(seen.append)
    else:
        knobs.runtime.launch_enter_hook = seen.append
        try:
            yield seen
        finally:
            knobs.runtime.launch_enter_hook = None
