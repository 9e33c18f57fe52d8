"""What calls of the Triton backend launch, by Triton's launcher and directly: one line of JSON a
case. Run by test_triton_launch.py in a process of its own.

A case is called four times, with the same memory: twice; then as if a profiler watched, that is by
Triton, with nothing remembered of earlier calls but compiled kernels; and, after all other cases,
once more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.kernels import stub_driver

M, WIDTH = 64, 128
FUSED_ROWS = 66 * 128
"""From so many rows on, `projected_forward` keeps 132 processors busy."""
Case = Callable[[], object]


def cases() -> dict[str, Case]:
    """Calls by name. "misaligned .." and "large .." are for Triton, each time."""
    import torch

    from oprd_kernels.backends.triton import BACKEND
    from oprd_kernels.call import GradCall, LossCall

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: dict[str, Case] = {}

    def states(dtype=bf16, shape=(M, WIDTH)) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def forward(name: str, call: LossCall, grad=None) -> None:
        found[name] = lambda: BACKEND.forward(call, grad)

    def backward(name: str, call: GradCall, grad, accumulate=False, grad_loss=None) -> None:
        one = torch.ones(()) if grad_loss is None else grad_loss
        found[name] = lambda: BACKEND.backward_(call, grad, accumulate, one)

    student, teacher, grad = states(), states(), states()
    saved = torch.zeros(1 << 18)
    weights, denominator = torch.ones(M), torch.ones(())
    rows, more = torch.arange(M), torch.ones(M + 1)
    odd = states(shape=(M * WIDTH + 4,))[4:].view(M, WIDTH)  # at 8 bytes past a multiple of 16
    one = LossCall(student, teacher)
    back = GradCall(saved, student, teacher)

    # Rows as they are. Each case differs from another in one thing.
    forward("identity", one)
    for name, fields in {
        "weights": {"weights": weights},
        "denominator": {"denominator": denominator},
        "weights and denominator": {"weights": weights, "denominator": denominator},
        "rows": {"rows": rows},
        "teacher_rows": {"teacher_rows": rows},
        "both rows": {"rows": rows, "teacher_rows": rows},
        "fewer rows": {"rows": rows[:5], "teacher_rows": rows[:5]},
        "kind": {"kind": "mse"},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "odd weights": {"weights": more[1:]},  # how they are aligned makes no other kernel
        "float32 teacher": {"teacher": states(fp32)},
        "float32 student": {"student": states(fp32)},
        "float32": {"student": states(fp32), "teacher": states(fp32)},
        "float16": {"student": states(fp16), "teacher": states(fp16)},
        "row stride": {"student": states(shape=(M, WIDTH + 16))[:, :WIDTH]},
        "teacher's row stride": {"teacher": states(shape=(M, WIDTH + 16))[:, :WIDTH]},
        "unit": {"student": states(shape=(M, WIDTH + 8))[:, :WIDTH]},
        "last stride": {"student": states(shape=(M, 2 * WIDTH))[:, ::2]},
        "batches": {"student": states(shape=(4, M // 4, WIDTH))},
        "gaps": {"student": states(shape=(4, M // 2, WIDTH))[:, : M // 4]},
        "misaligned": {"student": states(shape=(M, WIDTH + 16))[:, 1 : WIDTH + 1]},
        "misaligned teacher": {"teacher": odd},
    }.items():  # fmt: skip
        forward(f"identity, {name}" if "misaligned" not in name else f"{name}, identity",
                one._replace(**fields))  # fmt: skip
    forward("identity, narrower", LossCall(states(shape=(M, 64)), states(shape=(M, 64))))
    forward("identity, no rows", LossCall(states(shape=(0, WIDTH)), states(shape=(0, WIDTH))))
    forward("identity, one row", LossCall(states(shape=(1, WIDTH)), states(shape=(1, WIDTH))))
    forward("identity, many rows", LossCall(states(shape=(5000, 16)), states(shape=(5000, 16))))
    forward("identity, wide", LossCall(states(fp32, (2, 9000)), states(fp32, (2, 9000))))
    forward("in place", one, teacher)
    forward("in place, weights", one._replace(weights=weights), teacher)
    forward("in place, elsewhere", one, grad)
    forward("in place, float16", one, states(fp16))  # only this dtype tells it from the one before
    for name, stride in (("just not large", 2**31 - 1), ("large", 2**31)):
        far = states(shape=(1, WIDTH)).as_strided((1, WIDTH), (16 * stride, 1))
        forward(f"{name} stride", LossCall(far, states(shape=(1, WIDTH))))
        backward(f"{name} stride, backward", GradCall(saved, far, far.clone()), far)

    backward("identity backward", back, grad)
    backward("identity backward, accumulate", back, grad, True)
    backward("identity backward, weights", back._replace(weights=weights), grad)
    backward("identity backward, rows", back._replace(rows=rows), grad)
    backward("identity backward, teacher_rows", back._replace(teacher_rows=rows), grad)
    backward("identity backward, each", back, grad, False, torch.ones(M))
    backward("identity backward, one for all", back, grad, False, torch.ones(1).expand(M))
    backward("identity backward, float32 gradient", back, states(fp32))
    backward("identity backward, gradient's stride", back, states(shape=(M, 2 * WIDTH))[:, :WIDTH])
    backward("misaligned gradient", back, states(shape=(M, WIDTH + 16))[:, 1 : WIDTH + 1])
    wide = states(fp32, (2, 9000))
    backward("identity backward, wide", GradCall(saved, wide, wide.clone()), wide.clone())
    pieces = states(bf16, (2, 256 * 8))
    for accumulate in (False, True):
        backward(f"identity backward, pieces, accumulate {accumulate}",
                 GradCall(saved, pieces, pieces.clone()), pieces.clone(), accumulate)  # fmt: skip

    # Layers.
    calls = [LossCall(states(), states()) for _ in range(3)]
    grads, losses = [states() for _ in calls], torch.ones(3)
    unlike = [calls[0], calls[1]._replace(student=states(fp32)), calls[2]]
    for name, some in {
        "layers": calls, "two layers": calls[:2], "layers, unlike": unlike,
        "misaligned layer": [*calls[:2], calls[2]._replace(teacher=odd)],
    }.items():  # fmt: skip
        found[name] = lambda some=some: BACKEND.forward_layers(some)
    each = [GradCall(saved[n * 1024 :], c.student, c.teacher) for n, c in enumerate(calls)]
    found["layers backward"] = lambda: BACKEND.backward_layers_(each, grads, losses)
    strided = torch.ones(6)[::2]
    found["layers backward, strided"] = lambda: BACKEND.backward_layers_(each, grads, strided)
    odd_grads = [*grads[:2], odd]
    found["misaligned layers backward"] = lambda: BACKEND.backward_layers_(each, odd_grads, losses)

    # After a projection.
    proj, wider, mean = torch.zeros(8, WIDTH), torch.zeros(256, WIDTH), torch.zeros(WIDTH)
    many, target = states(shape=(FUSED_ROWS, 64)), states(shape=(M, 8))
    narrow = torch.zeros(8, 64)
    bridge = LossCall(student, teacher, proj, proj)
    forward("few rows", bridge)
    forward("few rows, mean", bridge._replace(teacher_mean=mean))
    forward("few rows, projected teacher", LossCall(student, target, proj))
    forward("few rows, rows", bridge._replace(rows=rows, teacher_rows=rows))
    forward("few rows, weights, none", bridge._replace(weights=weights, reduction="none"))
    forward("few rows, another number", bridge._replace(rows=rows[:5], teacher_rows=rows[:5]))
    forward("few rows, float32", LossCall(student.float(), teacher.float(), proj, proj))
    forward("few rows, float32 teacher", bridge._replace(teacher=teacher.float()))
    forward("few rows, float16 teacher", bridge._replace(teacher=states(fp16)))
    forward("few rows, other rank", LossCall(student, teacher, proj[:7], proj[:7]))
    forward("r = 256", LossCall(student, teacher, wider, wider))
    forward("many rows", LossCall(many, many.clone(), narrow, narrow))
    forward("many rows, weights, denominator", LossCall(
        many, many.clone(), narrow, narrow, weights=torch.ones(FUSED_ROWS),
        denominator=denominator))  # fmt: skip
    forward("misaligned, few rows", bridge._replace(student=odd))
    found["layers, few rows"] = lambda: BACKEND.forward_layers([bridge] * 3)

    projected = GradCall(saved, None, None, proj)
    for accumulate in (False, True):
        backward(f"Bridge backward, accumulate {accumulate}", projected, grad, accumulate)
    backward("Bridge backward, rows, weights", projected._replace(rows=rows, weights=weights), grad)
    backward("Bridge backward, each", projected, grad, False, torch.ones(M))
    backward("Bridge backward, r = 256", projected._replace(student_proj=wider), grad)
    backward("Bridge backward, float32", projected, states(fp32))
    backward("Bridge backward, float16", projected, states(fp16))
    backward("Bridge backward, batches", projected, states(shape=(4, M // 2, WIDTH))[:, :16])
    backward("misaligned Bridge backward", projected, odd)
    trained = projected._replace(student=student)
    found["projector"] = lambda: BACKEND.grad_proj(trained, denominator)
    some = trained._replace(rows=rows, weights=weights)
    found["projector, rows"] = lambda: BACKEND.grad_proj(some, denominator)
    double = trained._replace(student=student.float())
    found["projector, float32"] = lambda: BACKEND.grad_proj(double, denominator)
    aside = trained._replace(student=odd)
    found["misaligned projector"] = lambda: BACKEND.grad_proj(aside, denominator)
    return found


class Pool:
    """The same memory for a call as often as it is made."""

    def __init__(self) -> None:
        self._tensors: dict[tuple, Any] = {}
        self._next = 0

    def __call__(self, shape: int | tuple[int, ...], device: Any) -> Any:
        import torch

        key = self._next, shape
        self._next += 1
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(shape, device=device)
        return self._tensors[key]

    def rewind(self) -> None:
        """Begin a call."""
        self._next = 0


def forget() -> None:
    """What is remembered of earlier calls, compiled kernels aside."""
    from oprd_kernels.backends.triton import backend, configs, geometry, launch, operands

    for module in (backend, configs, geometry, launch, operands):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def main() -> None:
    """Print every case."""
    with tempfile.TemporaryDirectory() as folder:
        stub = stub_driver.install(Path(folder), record=True)
        from triton.runtime.errors import OutOfResources

        from oprd_kernels.backends.triton import backend, launch

        backend.new_floats = pool = Pool()
        ordinary = [0]
        by_triton = launch.Launch._by_triton

        def counted(*arguments: Any) -> Any:
            ordinary[0] += 1
            return by_triton(*arguments)

        launch.Launch._by_triton = counted  # type: ignore[method-assign]

        def run(case: Case) -> dict[str, Any]:
            pool.rewind()
            ordinary[0] = 0
            launches = [asdict(launch) for launch in stub.launches(case)]
            return {"launches": launches, "by_triton": ordinary[0]}

        def attempt(case: Case) -> dict[str, Any]:
            result = {"first": run(case), "second": run(case)}
            forget()
            with stub_driver.watched() as seen:
                result["watched"] = run(case)
            return result | {"seen": len(seen)}

        every = cases()
        found: dict[str, dict[str, Any]] = {}
        for name, case in every.items():
            try:
                found[name] = attempt(case)
            except OutOfResources as error:
                found[name] = {"error": str(error)}
        for name, case in reversed(every.items()):
            if "error" not in found[name]:
                found[name]["again"] = run(case)
        for name, result in found.items():
            print(json.dumps({"case": name} | result))


if __name__ == "__main__":
    main()
