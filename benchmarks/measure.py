"""Times all variants of a case in turns, in one process, and what memory each takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.machine import allocator
from benchmarks.regimes import OURS, Case
from oprd.memory import PeakMemory, trim


@dataclass(frozen=True)
class Measured:
    """Of one variant of a case.

    Attributes:
        seconds: one value a round.
        extra_bytes: peak memory above what was in use before the call; None where the system does
            not tell.
    """

    seconds: list[float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, mode: str, budget: float = 2.0, min_rounds: int = 5) -> dict[str, Measured]:
    """Run every variant once per round, until ``budget`` seconds are spent and ``min_rounds``
    rounds made. A variant of more than a second a call gets fewer rounds.

    Args:
        mode: ``warm`` or ``fresh`` memory, see `benchmarks.machine.allocator`.
    """
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
                before = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - before)
            rounds += 1
    return {name: Measured(seconds[name], extra[name]) for name in case.variants}


def gemm_flops() -> float:
    """Float32 operations a second of a 1536^3 product on the current number of threads."""
    n = 1536
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    times = []
    for _ in range(7):
        before = time.perf_counter()
        torch.mm(a, b, out=c)
        times.append(time.perf_counter() - before)
    return 2 * n**3 / statistics.median(times[1:])


def floor_seconds(case: Case, copy_seconds: float, flops_per_second: float) -> float:
    """The larger of bytes over this run's copy bandwidth and operations over its GEMM peak. A copy
    of M x d elements reads and writes them once."""
    bandwidth = 2 * case.activation_bytes / copy_seconds
    return max(case.floor_bytes / bandwidth, case.floor_flops / flops_per_second)
