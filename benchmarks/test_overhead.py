"""What a call costs besides its work: rows of eight floats, forward and backward, beside an empty
autograd.Function that takes, saves and returns as many tensors.

python -m benchmarks.test_overhead
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.machine import threads
from benchmarks.replay import replay
from oprd_kernels import fused_rep_loss, fused_rep_losses, rep_tap
from oprd_kernels.backends import cuda

LAYERS = 28
EMPTY = {
    "fused_rep_loss": "empty",
    "rep_tap": "empty, passes the states on",
    "fused_rep_losses": "empty, 28 layers",
    "cuda, no kernels": "empty",
}
"""What each is compared with."""

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


class EmptyTap(torch.autograd.Function):
    """The same, and returns the states."""

    @staticmethod
    def forward(ctx, student, teacher):
        ctx.save_for_backward(student, teacher)
        return student, torch.ops.oprd_benchmark.forward(student, teacher)

    @staticmethod
    def backward(ctx, grad_student, grad):
        student, _ = ctx.saved_tensors
        return torch.ops.oprd_benchmark.backward(grad, student), None


class EmptyLayers(torch.autograd.Function):
    """The same for layers, the students first."""

    @staticmethod
    def forward(ctx, *states):
        ctx.save_for_backward(*states)
        return states[0].new_empty(LAYERS)

    @staticmethod
    def backward(ctx, grad):
        students = ctx.saved_tensors[:LAYERS]
        return *(torch.empty_like(student) for student in students), *(None,) * LAYERS


class _NoKernels:
    """The native module's functions for CUDA, which return at once: what is left is Python's."""

    @staticmethod
    def cuda_scratch(*_: int) -> int:
        return 0

    @staticmethod
    def cuda_forward(*_arguments) -> None:
        pass

    @staticmethod
    def cuda_backward(*_arguments) -> None:
        pass


@contextmanager
def no_kernels() -> Iterator[None]:
    """The cuda backend takes tensors on the CPU and launches nothing."""
    before = cuda.BACKEND.machine
    cuda.BACKEND.machine = cuda.Machine("cpu", _NoKernels, lambda _index: 0)
    try:
        yield
    finally:
        cuda.BACKEND.machine = before


def calls() -> dict[str, Callable[[], torch.Tensor]]:
    """What gives each its loss."""
    student, teacher = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)
    students = [torch.randn(1, 8, requires_grad=True) for _ in range(LAYERS)]
    teachers = [torch.randn(1, 8) for _ in range(LAYERS)]
    return {
        "empty": lambda: Empty.apply(student, teacher),
        "fused_rep_loss": lambda: fused_rep_loss(student, teacher),
        "empty, passes the states on": lambda: EmptyTap.apply(student, teacher)[1],
        "rep_tap": lambda: rep_tap(student, teacher)[1],
        "empty, 28 layers": lambda: EmptyLayers.apply(*students, *teachers),
        "fused_rep_losses": lambda: fused_rep_losses(students, teachers),
        "cuda, no kernels": lambda: fused_rep_loss(student, teacher, backend="cuda"),
    }


def measure(
    rounds: int = 100, per_round: int = 50, backward: bool = True
) -> dict[str, list[float]]:
    """Seconds a call of this thread, all in turns.

    Args:
        backward: or forward alone.
    """
    losses = calls()
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    with threads(1), no_kernels():
        for _ in range(rounds):
            for name, loss in losses.items():
                one = torch.ones_like(loss())
                start = time.thread_time()
                for _ in range(per_round):
                    found = loss()
                    if backward:
                        found.backward(one)
                seconds[name].append((time.thread_time() - start) / per_round)
    return seconds


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    return measure()


@pytest.mark.parametrize("name", [*dict.fromkeys(EMPTY.values()), *EMPTY])
def test_overhead(benchmark, measured, name: str) -> None:
    benchmark.group = "overhead of a call, forward and backward"
    benchmark.name = name
    replay(benchmark, measured[name])


def main() -> None:
    """Prints the quickest and the median of each in microseconds, and how many times the empty
    one's these are."""
    for backward in (False, True):
        seconds = measure(backward=backward)
        print("forward and backward" if backward else "forward")
        for name, empty in EMPTY.items():
            cells = [name.ljust(18)]
            for of in (min, statistics.median):
                ours, other = of(seconds[name]), of(seconds[empty])
                cells.append(f"{ours * 1e6:6.1f} / {other * 1e6:6.1f} = {ours / other:.2f}")
            print("  " + "   ".join(cells))


if __name__ == "__main__":
    main()
