"""Peak memory of a block of code, in bytes.

On the CPU this is the kernel's high-water mark of the process, on a GPU the allocator's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 2**30


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def trim() -> None:
    """Return memory that the C library holds unused to the system.

    Its next use then counts towards the peak. Takes about a millisecond.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MMAP_LIMIT = 32 * 2**20
"""Upper limit of glibc's own adjustment of the threshold."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Return freed tensors to the system at once, so that a peak counts live tensors only.

    Otherwise the C library keeps freed blocks below 32 MiB in its fragmented heap. Each new tensor
    then needs new pages, which takes time: use this to measure memory, not seconds.

    Does nothing without glibc. On exit the thresholds are set to the values that glibc's own
    adjustment reaches once a program has freed a large block.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, _MMAP_LIMIT)
        mallopt(M_TRIM_THRESHOLD, 2 * _MMAP_LIMIT)


class PeakMemory:
    """Context manager that measures the peak memory of its block, in bytes.

    After ``with PeakMemory(device) as peak: ...``, ``peak.peak`` is the peak, ``peak.delta`` the
    peak minus the memory in use at the start, and ``peak.reserved`` (GPU only) the peak of the
    allocator's reserved memory. On the CPU "in use" means resident after unused memory was returned
    to the system. All three are None if the system doesn't report them (a CPU run outside Linux).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.start: int | None = None
        self.peak: int | None = None
        self.reserved: int | None = None

    @property
    def delta(self) -> int | None:
        """Bytes by which the peak exceeded the memory in use at the start."""
        if self.peak is None or self.start is None:
            return None
        return max(self.peak - self.start, 0)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            trim()
            with suppress(OSError):
                _CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
                self.start = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        elif self.start is not None:
            with suppress(OSError):
                self.peak = _status_bytes("VmHWM")


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes available to new tensors; None if the system doesn't report them.

    On a GPU this is its free memory. On the CPU it is the smaller of the machine's available memory
    and what this process's control group leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits: list[int] = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # ValueError: no limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(limit - used + int(dict(pairs)["inactive_file"]))
    return min(limits, default=None)
