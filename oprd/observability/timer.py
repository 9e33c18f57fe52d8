"""Timing of a run's phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from oprd.observability import hang_watchdog, progress


class PhaseTimer:
    """Wall-clock seconds by phase: ``total`` since the start, ``step`` since `take_step`.

    The seconds of queued phases are in both after the next `take_step`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._queued: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.total: dict[str, float] = defaultdict(float)
        self.step: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str, *, queued: bool = False) -> Iterator[None]:
        """Add the time spent inside the block to ``phase``, including pending work of the GPU.

        The phase is also what `oprd.observability.progress` shows meanwhile.

        Args:
            queued: on a GPU, do not wait for its work: time it where it stands in the queue.
        """
        hang_watchdog.beat(phase)
        if queued and self.device.type == "cuda":
            with progress.work(phase), self._in_queue(phase):
                yield
            hang_watchdog.beat(f"after {phase}")
            return
        self._synchronize()
        start = time.perf_counter()
        try:
            with progress.work(phase):
                yield
        finally:
            self._synchronize()
            seconds = time.perf_counter() - start
            self.total[phase] += seconds
            self.step[phase] += seconds
            hang_watchdog.beat(f"after {phase}")

    @contextmanager
    def _in_queue(self, phase: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._queued.append((phase, start, end))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take_step(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, and reset them.

        Waits for the GPU if phases are queued.
        """
        for phase, start, end in self._queued:
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
            self.total[phase] += seconds
            self.step[phase] += seconds
        self._queued = []
        taken, self.step = dict(self.step), defaultdict(float)
        return taken

    def drop_step(self) -> None:
        """Reset `step`, for what is done between two steps.

        The wait for the rollouts of the next step is kept: evaluations and checkpoints wait for
        them if they are being sampled.
        """
        waited = self.take_step().get("rollout")
        if waited is not None:
            self.step["rollout"] = waited
