"""Launches every kind of kernel, at small sizes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize [PART/PARTS]

With PART/PARTS, from 0/2 say, every second call: several processes compile at once.
Each result is also held against the reference on the CPU, loosely: the tests have their own rule.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_cases import available
from benchmarks.regimes import device
from oprd_kernels import BackendUnavailable, fused_rep_loss, fused_rep_losses, rep_tap

Call = tuple[str, Tensor, Tensor, dict]


def calls() -> Iterator[Call]:
    """What is run, loss and gradient each: name, student, teacher, options; tensors on the CPU."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for m, d in ((70, 256), (5, 4099)):
            pair = [torch.randn(m, d).to(dtype) for _ in range(2)]
            yield f"identity {m} x {d} {dtype}", *pair, {}
        rows, others = torch.tensor([3, 69, 0, 12]), torch.tensor([1, 1, 0, 2])
        weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
        chosen = {"rows": rows, "teacher_rows": others, "weights": weights}
        student, teacher = (torch.randn(70, 130).to(dtype) for _ in range(2))
        yield f"rows and weights {dtype}", student, teacher, chosen | {"reduction": "none"}
        for rank in (4, 16, 37, 64, 256):
            student, teacher = torch.randn(150, 136), torch.randn(150, 200)
            options = {
                "student_proj": torch.randn(rank, 136) / 12,
                "teacher_proj": torch.randn(rank, 200) / 14,
                "teacher_mean": torch.randn(200),
            }
            pair = student.to(dtype), teacher.to(dtype)
            yield f"Bridge r = {rank} {dtype}", *pair, options


def on(where: torch.device, options: dict, trained: bool) -> dict:
    """The options there; with ``trained``, P_S takes a gradient."""
    moved = {k: x.to(where) if isinstance(x, Tensor) else x for k, x in options.items()}
    if trained:
        moved["student_proj"] = moved["student_proj"].detach().requires_grad_()
    return moved


def gradients(loss: Tensor, student: Tensor, options: dict) -> tuple[Tensor, ...]:
    """Of the loss with respect to everything that takes one."""
    proj = options.get("student_proj")
    of = (student, proj) if proj is not None and proj.requires_grad else (student,)
    return torch.autograd.grad(loss.sum(), of)


def check(name: str, got: Tensor, want: Tensor) -> None:
    """Raises:
    AssertionError: unless they agree to a few per cent of the largest value.
    """
    got, want = got.detach().cpu().float(), want.detach().float()
    limit, error = 0.05 * want.abs().max(), (got - want).abs().max()
    assert error <= limit, f"{name}: off by {error:.3g}, {limit:.3g} allowed"


def main() -> None:
    """Run all calls, or a part of them, through all backends here."""
    here = torch.device("cpu")
    part, parts = map(int, sys.argv[1].split("/")) if len(sys.argv) > 1 else (0, 1)
    for name, *states, plain in list(calls())[part::parts]:
        trained = "student_proj" in plain and plain["student_proj"].shape[0] in (4, 64)
        options = on(here, plain, trained)
        student, teacher = states[0].requires_grad_(), states[1]
        expected = fused_rep_loss(student, teacher, backend="reference", **options)
        wanted = gradients(expected, student, options)
        options = on(device(), plain, trained)
        student, teacher = (x.detach().to(device()) for x in states)
        student.requires_grad_()
        for backend in available():
            ways = {"": fused_rep_loss, " tap": lambda *a, **k: rep_tap(*a, **k)[1]}
            try:
                for way, function in ways.items():
                    loss = function(student, teacher, backend=backend, **options)
                    check(name + way, loss, expected)
                    found = gradients(loss, student, options)
                    for got, want in zip(found, wanted, strict=True):
                        check(name + way, got, want)
                h, loss = rep_tap(student * 1, teacher, backend=backend, **options)
                torch.autograd.grad([h.sum(), loss.sum()], student)
                if not options:
                    lists = [student] * 3, [teacher] * 3
                    losses = fused_rep_losses(*lists, backend=backend)
                    gradients(losses, student, options)
                    loss = fused_rep_loss(student, teacher.clone(), inplace=True, backend=backend)
                    check(f"{name} in place", gradients(loss, student, options)[0], wanted[0])
            except BackendUnavailable:
                continue
            print(f"{backend}: {name}", flush=True)
    # Once on an H200 one process of eight was aborted by a thread of PyTorch's while it exited.
    # What is to be checked is over by then.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
