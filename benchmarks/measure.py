"""Times all variants of a case in turns, in one process, and what memory each takes.

On a CPU by the wall clock, on a GPU by `benchmarks.gpu_time`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import gpu_time
from benchmarks.machine import allocator
from benchmarks.regimes import DTYPES, OURS, Case, device
from oprd.observability.memory import PeakMemory, trim


@dataclass(frozen=True)
class Measured:
    """Of one variant of a case.

    Attributes:
        seconds: one value a round.
        extra_bytes: peak memory above what was in use before the call; None where the system does
            not tell.
        host_seconds: on a GPU, until the call returned; ``seconds`` are then the device's alone.
    """

    seconds: list[float]
    extra_bytes: int | None
    host_seconds: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, mode: str, budget: float = 2.0, min_rounds: int = 5) -> dict[str, Measured]:
    """Run every variant once per round, until ``budget`` seconds are spent and ``min_rounds``
    rounds made. A variant of more than a second a call gets fewer rounds.

    Args:
        mode: ``warm`` or ``fresh`` memory, see `benchmarks.machine.allocator`; a GPU's caching
            allocator is always warm.
    """
    if device().type == "cuda":
        return measure_gpu(case, budget, min_rounds)
    seconds: dict[str, list[float]] = {name: [] for name in case.variants}
    extra: dict[str, int | None] = {}
    with allocator("fresh"):
        for name, call in case.variants.items():
            call()  # compilation, first touch
            with PeakMemory() as peak:
                call()
            extra[name] = peak.delta
    with allocator(mode):
        for call in case.variants.values():
            call()
        start = time.perf_counter()
        rounds = 0
        while rounds < min_rounds or (time.perf_counter() - start < budget and rounds < 50):
            for name, call in case.variants.items():
                slow = sum(seconds[name]) > max(budget, 2.0) and len(seconds[name]) >= 3
                if slow and name != OURS:
                    continue
                if mode == "fresh":
                    trim()  # nothing that an earlier call has freed is left to reuse
                seconds[name].append(_wall_seconds(call))
            rounds += 1
    return {name: Measured(seconds[name], extra[name]) for name in case.variants}


def measure_gpu(case: Case, budget: float, min_rounds: int) -> dict[str, Measured]:
    """The same by the device's clock; before every call a buffer of four times the L2 cache is
    read, so that no call finds its inputs there."""
    recorded, host, extra = {}, {}, {}
    for name, call in case.variants.items():
        for _ in range(3):  # compilation, clocks
            call()
        host[name] = gpu_time.host_seconds(call, calls=5, repeats=3)
        extra[name] = gpu_time.extra_bytes(call)
        recorded[name] = gpu_time.record([call])
    seconds = gpu_time.in_turns(recorded, budget, min_rounds, gpu_time.cold_cache())
    return {name: Measured(seconds[name], extra[name], host[name]) for name in case.variants}


def gemm_flops(dtype: str = "fp32") -> float:
    """Operations a second of a square product: float32 on the current number of threads of a CPU,
    ``dtype`` on a GPU (bf16: its tensor cores)."""
    gpu = device().type == "cuda"
    n = 8192 if gpu else 1536
    kind = DTYPES[dtype] if gpu else torch.float32
    a, b = (torch.randn(n, n, device=device()).to(kind) for _ in range(2))
    product = Case("gemm", n, n, dtype, 0, 0, 0, {"gemm": lambda: torch.mm(a, b)})
    if gpu:
        times = measure_gpu(product, 0.5, 10)["gemm"].seconds
    else:
        times = [_wall_seconds(product.variants["gemm"]) for _ in range(7)][1:]
    return 2 * n**3 / statistics.median(times)


def _wall_seconds(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def floor_seconds(case: Case, copy_seconds: float, flops_per_second: float) -> float:
    """The larger of bytes over this run's copy bandwidth and operations over its GEMM peak. A copy
    of M x d elements reads and writes them once."""
    bandwidth = 2 * case.activation_bytes / copy_seconds
    return max(case.floor_bytes / bandwidth, case.floor_flops / flops_per_second)
