"""Peak memory of a stretch of work: the kernel's high-water mark on the CPU, the allocator's on a
GPU. Bytes."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
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
