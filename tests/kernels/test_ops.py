"""The operators as PyTorch sees them: opcheck, gradcheck, torch.compile, autocast."""

import pytest
import torch

from oprd_kernels import fused_rep_loss, rep_tap
from oprd_kernels.validate import check_call

OPTIONS = {
    "student_proj": None,
    "teacher_proj": None,
    "teacher_mean": None,
    "rows": None,
    "teacher_rows": None,
    "weights": None,
    "kind": "nmse",
    "reduction": "mean",
    "denominator": None,
}


def op_args(student, teacher, backend, **options):
    return (*check_call(student, teacher, **(OPTIONS | options)), backend)


def options_for(rank, rows):
    options = {"weights": torch.tensor([1.0, 0.0, 2.0])} if rows else {}
    if rank:
        options |= {
            "student_proj": torch.randn(rank, 12, requires_grad=True),
            "teacher_proj": torch.randn(rank, 12),
            "teacher_mean": torch.randn(12),
        }
    return options | ({"rows": torch.tensor([0, 5, 2])} if rows else {})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_opcheck_forward_and_autograd(backend, rank, rows, reduction, zeroed_memory):
    student = torch.randn(2, 3, 12, requires_grad=True)
    teacher = torch.randn(3, 12) if rows else torch.randn(2, 3, 12)
    args = op_args(student, teacher, backend, reduction=reduction, **options_for(rank, rows))
    torch.library.opcheck(torch.ops.oprd.rep_loss.default, args)


@pytest.mark.parametrize("rank", [0, 3])
def test_opcheck_backward_ops(backend, rank, zeroed_memory):
    student, teacher = torch.randn(6, 12), torch.randn(6, 12)
    args = op_args(student, teacher, backend, **options_for(rank, False))
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    _, saved = torch.ops.oprd.rep_loss(*args)
    proj = args[2]
    wide = (None, None) if rank else (student, teacher)
    options = (None, None, None, "nmse", "mean", backend)
    torch.library.opcheck(
        torch.ops.oprd.rep_loss_grad_.default,
        (torch.randn(6, 12), True, torch.ones(()), saved, *wide, proj, *options),
    )
    torch.library.opcheck(
        torch.ops.oprd.rep_loss_in_place_.default,
        (student, teacher.clone(), None, None, "nmse", "mean", backend),
    )
    if rank:
        torch.library.opcheck(
            torch.ops.oprd.rep_loss_grad_proj.default,
            (torch.ones(()), saved, student, None, proj, *options),
        )


@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
@pytest.mark.parametrize("rank", [0, 2])
def test_reference_passes_gradcheck_in_float64(rank, kind):
    torch.manual_seed(0)
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    proj = torch.randn(rank, 5, dtype=torch.float64, requires_grad=True) if rank else None
    options = {"weights": torch.tensor([1.0, 0.0, 2.0, 0.5]), "kind": kind}
    if rank:
        options["teacher_proj"] = torch.randn(rank, 5, dtype=torch.float64)

    def loss(s, p=None):
        return fused_rep_loss(s, teacher, student_proj=p, **options)

    assert torch.autograd.gradcheck(loss, (student, proj) if rank else (student,))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("tapped", [False, True], ids=["loss", "tap"])
def test_compiles_as_one_graph(backend, tapped, rank, compiler):
    torch.compiler.reset()  # `f` is compiled anew for each combination, more often than it may be
    torch.manual_seed(0)
    teacher, options = torch.randn(3, 12), options_for(rank, True)
    w = torch.randn(12, 12)

    def f(x):
        h = x @ w
        if tapped:
            h, loss, stats = rep_tap(h, teacher, backend=backend, return_stats=True, **options)
            return loss + h.tanh().sum(), stats.cosine
        loss, stats = fused_rep_loss(h, teacher, backend=backend, return_stats=True, **options)
        return loss + h.tanh().sum(), stats.cosine

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend=compiler)):
        x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if rank:
            options["student_proj"].grad = None
        total, cosine = g(x)
        total.backward()
        results.append([total.detach(), cosine, x.grad])
        if rank:
            results[-1].append(options["student_proj"].grad.clone())
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_loss_in_float32(backend):
    student = torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = student @ torch.eye(12)
        loss = fused_rep_loss(h, torch.randn(4, 12, dtype=h.dtype), backend=backend)
    assert h.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad.dtype == torch.float32
