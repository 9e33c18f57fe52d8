"""What a call costs besides its work: one row of eight floats, forward and backward, beside an
empty autograd.Function around an empty library op."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.machine import threads
from benchmarks.replay import replay
from oprd_kernels import fused_rep_loss, rep_tap

_LIBRARY = torch.library.Library("oprd_benchmark", "DEF")
_LIBRARY.define("forward(Tensor student, Tensor teacher) -> Tensor")
_LIBRARY.define("backward(Tensor grad, Tensor student) -> Tensor")
_LIBRARY.impl("forward", lambda student, teacher: student.new_empty(()), "CPU")
_LIBRARY.impl("backward", lambda grad, student: torch.empty_like(student), "CPU")


class Empty(torch.autograd.Function):
    """Saves its inputs, allocates what it returns, computes nothing."""

    @staticmethod
    def forward(ctx, student, teacher):
        ctx.save_for_backward(student, teacher)
        return torch.ops.oprd_benchmark.forward(student, teacher)

    @staticmethod
    def backward(ctx, grad):
        student, _ = ctx.saved_tensors
        return torch.ops.oprd_benchmark.backward(grad, student), None


def calls() -> dict[str, Callable[[], object]]:
    """Forward and backward of each."""
    student, teacher = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)
    losses = {
        "empty": lambda: Empty.apply(student, teacher),
        "fused_rep_loss": lambda: fused_rep_loss(student, teacher),
        "rep_tap": lambda: rep_tap(student, teacher)[1],
    }
    return {name: (lambda loss=loss: loss().backward()) for name, loss in losses.items()}


def measure(rounds: int = 40, per_round: int = 200) -> dict[str, list[float]]:
    """Seconds a call, the three in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls()}
    with threads(1):
        for _ in range(rounds):
            for name, call in calls().items():
                call()
                start = time.perf_counter()
                for _ in range(per_round):
                    call()
                seconds[name].append((time.perf_counter() - start) / per_round)
    return seconds


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    return measure()


@pytest.mark.parametrize("name", ["empty", "fused_rep_loss", "rep_tap"])
def test_overhead(benchmark, measured, name: str) -> None:
    benchmark.group = "overhead of a call, forward and backward"
    benchmark.name = name
    replay(benchmark, measured[name])
