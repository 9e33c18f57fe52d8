"""Host time of the Triton backend on a machine without a GPU: Triton's launcher, on a CUDA driver
that launches nothing (`tests.kernels.stub_driver`). Microseconds of processor time a call:

    OMP_NUM_THREADS=1 python -m benchmarks.host_stubbed [--rounds N | --profile NAME]

What a GPU machine adds: the driver's launch (2 to 5 us each), the caching allocator instead of
malloc, autograd's hand-over to the device's thread. An empty autograd.Function, which pays for the
last two as well, is the measure.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.kernels import stub_driver

M, WIDTH, RANK, LAYERS = 64, 128, 8, 28
Call = Callable[[], object]


def backend_calls() -> dict[str, Call]:
    """The backend alone."""
    import torch

    from oprd_kernels.backends.triton import BACKEND
    from oprd_kernels.call import GradCall, LossCall

    student = torch.zeros(M, WIDTH, dtype=torch.bfloat16)
    teacher, grad = torch.zeros_like(student), torch.zeros_like(student)
    proj, one = torch.zeros(RANK, WIDTH), torch.ones(())
    identity, bridge = LossCall(student, teacher), LossCall(student, teacher, proj, proj)
    saved, bridge_saved = BACKEND.forward(identity)[1], BACKEND.forward(bridge)[1]
    identity_grad = GradCall(saved, student, teacher)
    bridge_grad = GradCall(bridge_saved, student, None, proj)
    calls = [LossCall(torch.zeros_like(student), teacher) for _ in range(LAYERS)]
    grads, ones = [torch.zeros_like(student) for _ in calls], torch.ones(LAYERS)
    layers_saved = BACKEND.forward_layers(calls)[1]
    grad_calls = [
        GradCall(saved, call.student, call.teacher)
        for call, saved in zip(calls, layers_saved.unbind(), strict=True)
    ]
    return {
        "identity forward": lambda: BACKEND.forward(identity),
        "identity backward": lambda: BACKEND.backward_(identity_grad, grad, False, one),
        "Bridge forward": lambda: BACKEND.forward(bridge),
        "Bridge backward": lambda: BACKEND.backward_(bridge_grad, grad, False, one),
        "Bridge projector": lambda: BACKEND.grad_proj(bridge_grad, one),
        f"{LAYERS} layers forward": lambda: BACKEND.forward_layers(calls),
        f"{LAYERS} layers backward": lambda: BACKEND.backward_layers_(grad_calls, grads, ones),
    }


def whole_calls() -> dict[str, Call]:
    """The public functions, beside an autograd.Function that does nothing."""
    import torch

    from benchmarks.test_overhead import Empty
    from oprd_kernels import fused_rep_loss, fused_rep_losses, rep_tap

    student = torch.zeros(M, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    teacher, proj = torch.zeros(M, WIDTH, dtype=torch.bfloat16), torch.zeros(RANK, WIDTH)
    bridge = {"student_proj": proj, "teacher_proj": proj}
    students = [student.detach().clone().requires_grad_() for _ in range(LAYERS)]
    teachers = [torch.zeros_like(teacher) for _ in range(LAYERS)]
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "empty": lambda: Empty.apply(student, teacher),
        "fused_rep_loss": lambda: fused_rep_loss(student, teacher, backend="triton"),
        "rep_tap": lambda: rep_tap(student, teacher, backend="triton")[1],
        "fused_rep_loss, Bridge": lambda: fused_rep_loss(
            student, teacher, backend="triton", **bridge
        ),
        f"fused_rep_losses, {LAYERS} layers": lambda: fused_rep_losses(
            students, teachers, backend="triton"
        ).sum(),
    }

    def with_backward(loss: Callable[[], torch.Tensor]) -> Call:
        def call() -> None:
            student.grad = None
            for x in students:
                x.grad = None
            loss().backward()

        return call

    return losses | {f"{name} + backward": with_backward(loss) for name, loss in losses.items()}


def microseconds(calls: dict[str, Call], rounds: int, per_round: int = 50) -> dict[str, float]:
    """The fastest round of each, taken in turns, in processor time: others use this machine as
    well, and its clock changes."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.process_time()
            for _ in range(per_round):
                call()
            spent = (time.process_time() - start) / per_round * 1e6
            found[name] = min(found[name], spent)
    return found


def main() -> None:
    """Print the table, or the profile of one call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--profile", metavar="NAME", help="profile this call instead")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stub = stub_driver.install(Path(folder), record=False)
        import torch
        import triton

        torch.set_num_threads(1)
        calls = backend_calls() | whole_calls()
        if arguments.profile:
            _profile(calls[arguments.profile])
            return
        launches = {}
        for name, call in calls.items():
            for _ in range(3):
                before = stub.num_launches
                call()
            launches[name] = stub.num_launches - before
        direct = microseconds(calls, arguments.rounds)
        with stub_driver.watched():
            ordinary = microseconds(calls, arguments.rounds // 4)
        print(f"Triton {triton.__version__}, torch {torch.__version__}: us a call")
        print(f"{'':40} launches  direct  of an empty Function's  by Triton")
        for name in calls:
            empty = direct["empty + backward" if "+ backward" in name else "empty"]
            times = f"{direct[name]:7.1f} {direct[name] / empty:23.2f} {ordinary[name]:10.1f}"
            print(f"{name:40} {launches[name]:8} {times}")


def _profile(call: Call, count: int = 20000) -> None:
    for _ in range(100):
        call()
    with cProfile.Profile() as profile:
        for _ in range(count):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
