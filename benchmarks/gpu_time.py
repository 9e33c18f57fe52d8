"""Device time and host time of calls on a GPU, each by itself.

Device time is what the GPU is busy with: calls are captured in a CUDA graph and replayed, and where
a call can't be captured, queued behind a kernel that sleeps for longer than queueing takes
(`Recorded.method` says which). Host time is what Python takes until a call returns, with nothing
in the queue to wait for. Without a GPU both are the wall clock's, so that tests can run this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_CYCLES_A_SECOND = 2_000_000_000
"""Of the clock that torch.cuda._sleep counts; a slower GPU sleeps for longer, and no harm done."""


@dataclass(frozen=True)
class Recorded:
    """Calls that can be run again as one.

    Attributes:
        run: queues all of them.
        calls: how many.
        method: ``graph``, ``queued`` or ``wall clock``.
        host_seconds: what one run takes the host.
        kept: what the calls returned, so that each has had memory of its own.
    """

    run: Call
    calls: int
    method: str
    host_seconds: float
    kept: object = None


def record(calls: Sequence[Call], in_graph: bool = True) -> Recorded:
    """Make one run of ``calls``, which are warm already, by a CUDA graph if that can be.

    Args:
        in_graph: False if it is known that it can't.
    """
    if not torch.cuda.is_available():
        return Recorded(lambda: [call() for call in calls], len(calls), "wall clock", 0.0)
    run, method, kept = (lambda: [call() for call in calls]), "queued", None
    if in_graph:
        try:
            graph, kept = _capture(calls)
        except RuntimeError as error:  # it waits for the device, say
            print(f"not captured in a graph: {error}"[:300], flush=True)
            torch.cuda.synchronize()
        else:
            run, method = graph.replay, "graph"
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return Recorded(run, len(calls), method, host, kept)


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """Without torch.cuda.graph, whose garbage collection takes longer than all the rest."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    pool = torch.cuda.graph_pool_handle()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        torch.cuda.synchronize()
        graph.capture_begin(pool=pool)
        try:
            kept = [call() for call in calls]
        except Exception as error:
            _give_up(graph, pool)
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph, kept


def _give_up(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture that failed, and with it the allocator's use of ``pool``: else no memory could
    be given back to the GPU any more."""
    try:
        graph.capture_end()
    except RuntimeError:  # it was invalidated
        device = torch.cuda.current_device()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)


def in_turns(
    recorded: Mapping[str, Recorded], budget: float, min_rounds: int, cold: Call | None = None
) -> dict[str, list[float]]:
    """Seconds a call, one value a round, until ``budget`` seconds are spent and ``min_rounds``
    made.

    Args:
        cold: queued before each run, to empty the cache; not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in recorded}
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() - start < budget and rounds < 200):
        for name, one in recorded.items():
            seconds[name].append(_seconds_of_run(one, cold) / one.calls)
        rounds += 1
    return seconds


def _seconds_of_run(one: Recorded, cold: Call | None) -> float:
    if one.method == "wall clock":
        before = time.perf_counter()
        one.run()
        return time.perf_counter() - before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cold is not None:
        cold()
    # Everything is queued by the time the device gets to the first event.
    torch.cuda._sleep(int((1.5 * one.host_seconds + 30e-6) * _CYCLES_A_SECOND))
    begin.record()
    one.run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_seconds(call: Call, calls: int = 50, repeats: int = 7) -> float:
    """What a warm call takes the host: the median over ``repeats`` of ``calls`` in a row, which a
    queue has room for, and which the GPU must not take longer for than the host."""
    found = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(found)


def extra_bytes(call: Call) -> int | None:
    """Peak memory of a warm call above what was in use before it, its results included; None
    without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cold_cache() -> Call:
    """A call that reads four times the L2 cache, so that none of the next call's inputs is there,
    and nothing that would have to be written back first."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.zeros(max(4 * cache, 2**26) // 4, device="cuda")
    return buffer.amax
