"""Memory over the time of one update.

On a GPU it is the allocator's own record of every allocation, and each is known by the phase that
made it. On the CPU a thread samples the process's resident bytes.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oprd.observability.memory import freed_at_once, trim

STATM = Path("/proc/self/statm")
INTERVAL = 0.0005
"""Seconds between samples on the CPU."""
POINTS = 1500
"""Most points of a timeline. More are thinned to the highest of each of as many stretches."""
BEFORE = "before the update"

Stretch = tuple[str, float, float]
"""A phase, its start and its end, in seconds."""


@dataclass(frozen=True)
class Timeline:
    """Memory over time.

    Attributes:
        seconds: times of the points, from the first phase's start.
        bytes: bytes at these times, above those at the start.
        start: bytes in use at the start; None where only the process's are known (CPU).
        stretches: (phase, start, end) in the same seconds.
        born: bytes that are live at the peak, by the phase that allocated them (GPU only).
    """

    seconds: list[float]
    bytes: list[int]
    start: int | None
    stretches: list[Stretch]
    born: dict[str, int] = field(default_factory=dict)


class Recording:
    """The points of a block: times by `time.perf_counter`, and what happened then."""

    def __init__(self) -> None:
        self.start: int | None = None
        self.sampled: list[tuple[float, int]] = []
        self.events: list[dict[str, Any]] = []
        self.epoch = 0.0  # of `time.perf_counter`, in seconds since 1970

    def timeline(self, stretches: Sequence[Stretch]) -> Timeline | None:
        """Return the timeline of these phases; None if nothing was recorded."""
        if not stretches:
            return None
        zero = stretches[0][1]
        shifted = [(name, a - zero, b - zero) for name, a, b in stretches]
        born: dict[str, int] = {}
        if self.events:
            points, born = live_bytes(self.events, shifted, 1e6 * (self.epoch + zero))
        else:
            first = self.sampled[0][1] if self.sampled else 0
            points = [(t - zero, size - first) for t, size in self.sampled]
        end = shifted[-1][2]
        points = thinned([p for p in points if 0 <= p[0] <= end])
        if not points:
            return None
        seconds, sizes = zip(*points, strict=True)
        return Timeline(list(seconds), list(sizes), self.start, shifted, born)


def live_bytes(
    events: Sequence[dict[str, Any]], stretches: Sequence[Stretch], zero_us: float
) -> tuple[list[tuple[float, int]], dict[str, int]]:
    """Return the live bytes after each event, and at their peak by the phase that allocated them.

    Args:
        events: of `torch.cuda.memory`'s trace: ``action`` (``alloc``, ``free_completed``, ..),
            ``addr``, ``size`` and ``time_us``.
        stretches: phases in seconds.
        zero_us: the time of second 0.

    Returns:
        (seconds, bytes) of each event, above those at the first; and bytes by phase. Memory from
        before that is freed counts negative, under `BEFORE`.
    """
    starts = [start for _, start, _ in stretches]
    known: dict[int, tuple[int, str]] = {}
    live: dict[str, int] = defaultdict(int)
    points: list[tuple[float, int]] = []
    total = highest = 0
    at_peak: dict[str, int] = {}
    for event in events:
        seconds = (event["time_us"] - zero_us) / 1e6
        if event["action"] == "alloc":
            index = max(0, bisect.bisect_right(starts, seconds) - 1)
            phase, change = stretches[index][0], event["size"]
            known[event["addr"]] = (change, phase)
        elif event["action"] == "free_completed":
            size, phase = known.pop(event["addr"], (event["size"], BEFORE))
            change = -size
        else:
            continue
        live[phase] += change
        total += change
        points.append((seconds, total))
        if total > highest:
            highest, at_peak = total, {name: size for name, size in live.items() if size}
    return points, at_peak


def thinned(points: Sequence[tuple[float, int]], most: int = POINTS) -> list[tuple[float, int]]:
    """Return at most ``most`` points: the highest of each of as many equal parts."""
    if len(points) <= most:
        return list(points)
    borders = [round(i * len(points) / most) for i in range(most + 1)]
    parts = (points[a:b] for a, b in itertools.pairwise(borders))
    return [max(part, key=lambda p: p[1]) for part in parts]


@contextmanager
def recorded(device: torch.device) -> Iterator[Recording]:
    """Record the memory of the block. Nothing is recorded on a CPU outside Linux."""
    gc.collect()
    recording = Recording()
    if device.type == "cuda":
        with _traced(device, recording):
            yield recording
    elif STATM.exists():
        with freed_at_once(), _sampled(recording):
            yield recording
    else:
        yield recording


@contextmanager
def _traced(device: torch.device, recording: Recording) -> Iterator[None]:
    torch.cuda.synchronize(device)
    recording.start = torch.cuda.memory_allocated(device)
    recording.epoch = time.time() - time.perf_counter()
    torch.cuda.memory._record_memory_history("all", context=None)
    try:
        yield
        torch.cuda.synchronize(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        recording.events = torch.cuda.memory._snapshot(device)["device_traces"][index]
    finally:
        torch.cuda.memory._record_memory_history(None)


@contextmanager
def _sampled(recording: Recording) -> Iterator[None]:
    trim()
    page, stop = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def sample() -> None:
        with STATM.open("rb", buffering=0) as file:
            while True:
                file.seek(0)
                resident = int(file.read().split()[1]) * page
                recording.sampled.append((time.perf_counter(), resident))
                if stop.wait(INTERVAL):
                    return

    thread = threading.Thread(target=sample, daemon=True, name="memory")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
