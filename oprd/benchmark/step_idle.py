"""The share of the time in which a GPU runs no kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of (start, end) intervals, which may overlap."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total


def idle_share(device: torch.device, call: Callable[[], object]) -> float | None:
    """Call a function under the profiler; return the share of its time without a kernel.

    Copies count as kernels. On the CPU, operators do: that is only good for trying this. None if
    the profiler sees no kernel, as where it may not read the GPU's counters.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[activity]) as profiled:
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    raw = profiled.profiler
    assert raw is not None
    assert raw.kineto_results is not None
    # Not through `events()`, which makes a Python object of several kB for each kernel.
    busy = covered(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in raw.kineto_results.events()
        if (event.device_type() == torch.autograd.DeviceType.CUDA) == on_gpu
        and not event.is_user_annotation()  # a stretch of many kernels, with what is between them
    )
    return max(0.0, 1.0 - busy / (1e9 * wall)) if busy else None
