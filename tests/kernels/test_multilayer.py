"""Several layers in one launch are the single layers, bit for bit."""

import pytest
import torch

from oprd_kernels import fused_rep_loss, fused_rep_losses
from oprd_kernels.backends import cuda

LAYERS = 3


def make(rank, dtype=torch.float32):
    torch.manual_seed(0)
    students = [torch.randn(4, 5, 33).to(dtype).requires_grad_() for _ in range(LAYERS)]
    teachers = [torch.randn(12, 33).to(dtype) for _ in range(LAYERS)]
    options = {
        "rows": torch.randperm(20)[:12],
        "weights": torch.arange(12.0) % 3,
        "kind": "cosine",
    }
    lists = {}
    if rank:
        lists = {
            "student_proj": [torch.randn(rank, 33).requires_grad_() for _ in range(LAYERS)],
            "teacher_proj": [torch.randn(rank, 33) for _ in range(LAYERS)],
            "teacher_mean": [torch.randn(33) for _ in range(LAYERS)],
        }
    return students, teachers, options, lists


def gradients(tensors):
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4, 40])
def test_equals_layer_by_layer(backend, rank, dtype):
    if backend == "cuda" and rank > cuda.MAX_RANK:
        pytest.skip(f"the cuda backend projects to {cuda.MAX_RANK} dimensions at most")
    students, teachers, options, lists = make(rank, dtype)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    trained = [*students, *lists.get("student_proj", [])]

    singles, stats = [], []
    for i in range(LAYERS):
        one = {name: column[i] for name, column in lists.items()}
        loss, stat = fused_rep_loss(
            students[i], teachers[i], backend=backend, return_stats=True, **one, **options
        )
        singles.append(loss)
        stats.append(torch.stack(stat))
    (torch.stack(singles) * upstream).sum().backward()
    expected = gradients(trained)

    plural = {name + "s": column for name, column in lists.items()}
    losses, found = fused_rep_losses(
        students, teachers, backend=backend, return_stats=True, **plural, **options
    )
    (losses * upstream).sum().backward()
    assert torch.equal(losses, torch.stack(singles))
    assert torch.equal(torch.stack(found, 1), torch.stack(stats))
    for ours, wanted in zip(gradients(trained), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_reference_backend_agrees():
    students, teachers, options, _ = make(0)
    ours = fused_rep_losses(students, teachers, **options)
    assert torch.allclose(
        ours, fused_rep_losses(students, teachers, backend="reference", **options)
    )


def test_same_bits_on_any_number_of_threads(compiled_backend):
    torch.manual_seed(0)
    students = [torch.randn(301, 517, requires_grad=True) for _ in range(LAYERS)]
    teachers = [torch.randn(301, 517) for _ in range(LAYERS)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            losses = fused_rep_losses(students, teachers, backend=compiled_backend)
            losses.sum().backward()
            results.append([losses, *gradients(students)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck_and_compile(backend, rank, zeroed_memory):
    torch.compiler.reset()
    students, teachers, options, lists = make(rank)
    columns = [lists.get(n, []) for n in ("student_proj", "teacher_proj", "teacher_mean")]
    arguments = (students, teachers, *columns, options["rows"], None, options["weights"], None)
    arguments += ("nmse", "mean", backend)
    torch.library.opcheck(torch.ops.oprd.rep_losses.default, arguments)
    plain = [s.detach() for s in students]
    projs = [p.detach() for p in columns[0]]
    with torch.no_grad():
        _, saved = torch.ops.oprd.rep_losses(*arguments)
    states = ([], []) if rank else (plain, teachers)
    shared = (options["rows"], None, options["weights"], "nmse", "mean", backend)
    grads = [torch.zeros_like(s) for s in plain]
    torch.library.opcheck(
        torch.ops.oprd.rep_losses_grad_.default,
        (grads, torch.ones(LAYERS), list(saved), *states, projs, *shared),
    )

    plural = {name + "s": column for name, column in lists.items()}

    def f(*students):
        return fused_rep_losses(students, teachers, backend=backend, **plural, **options).sum()

    f(*students).backward()
    eager = gradients(students)
    torch.compile(f, fullgraph=True, backend="aot_eager")(*students).backward()
    for ours, wanted in zip(gradients(students), eager, strict=True):
        assert torch.equal(ours, wanted)


def test_mistakes_are_explained():
    s, t = [torch.randn(2, 4)], [torch.randn(2, 4)]
    with pytest.raises(ValueError, match="students is empty"):
        fused_rep_losses([], [])
    with pytest.raises(ValueError, match="teachers has 2 tensors for 1 layers"):
        fused_rep_losses(s, t * 2)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        fused_rep_losses(s, t, reduction="none")
    with pytest.raises(ValueError, match=r"layer 1 has student \(3, 4\)"):
        fused_rep_losses([*s, torch.randn(3, 4)], [*t, torch.randn(3, 4)])
