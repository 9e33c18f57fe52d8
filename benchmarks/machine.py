"""What the machine can do, and its allocator's two ways with large tensors."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's mallopt


def _mallopt(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def allocator(mode: str) -> Iterator[None]:
    """``warm``: memory that is freed stays with the process and is used again, as with a GPU's
    caching allocator; ``fresh``: large tensors get new pages from the system in every call, which
    is what glibc does by itself with anything above 32 MiB."""
    if mode == "warm":
        _mallopt(_MMAP_MAX, 0)
        _mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    else:
        _mallopt(_MMAP_MAX, 65536)
        _mallopt(_MMAP_THRESHOLD, 128 * 1024)
        _mallopt(_TRIM_THRESHOLD, 128 * 1024)
    try:
        yield
    finally:
        _mallopt(_MMAP_MAX, 65536)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch on n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe() -> dict[str, str | int]:
    """The machine in a few words, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    from oprd_kernels import native

    simd = "no native kernels" if native.problem() else native.module().simd_name()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": cpu,
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "simd": simd,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_gpu() -> dict[str, str | int]:
    """The GPU, if there is one, and the versions that its kernels' figures depend on."""
    found: dict[str, str | int] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "none",
            "driver": _driver(),
        }
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    cores = _cores()
    versions = {"torch": torch.__version__, "triton": triton}
    return found | versions | {"python": platform.python_version(), "cores": cores}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")
