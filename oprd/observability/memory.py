"""Peak memory of a stretch of work: the kernel's high-water mark on the CPU, the allocator's on a
GPU. Bytes."""

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
    """Give memory that is free inside the process back to the system, so that it counts again
    when it is next used. Takes about a millisecond."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MMAP_LIMIT = 32 * 2**20
"""Where glibc's own adjustment of the threshold ends."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While open, a freed tensor leaves the process at once, so that a peak is that of what is
    alive; otherwise the C library keeps freed memory below 32 MiB in its heap, full of holes. New
    tensors then need new pages, which takes time: for measuring memory, not seconds.

    Does nothing without glibc. Afterwards the thresholds are those that glibc's own adjustment
    reaches once a program has freed something large.
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
    """``with PeakMemory(device) as peak: ...``, then ``peak.delta`` (peak minus what was in use at
    the start), ``peak.peak`` and, on a GPU, ``peak.reserved``.

    On the CPU "in use" is what is resident once free memory is given back. All three are None
    where the system does not tell (a CPU run outside Linux).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.start: int | None = None
        self.peak: int | None = None
        self.reserved: int | None = None

    @property
    def delta(self) -> int | None:
        """Bytes by which the peak exceeded what was there at the start."""
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
    """Memory that new tensors can take: what the GPU has free, or the machine and this process's
    control group; None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found: list[int] = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # ValueError: no limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(dict(pairs)["inactive_file"]))
    return min(found, default=None)
