"""Gradient-in-forward over the teacher's memory."""

import pytest
import torch

from oprd_kernels import fused_rep_loss

KINDS = ("mse", "nmse", "cosine")


def pair(dtype=torch.float32, shape=(4, 5, 33)):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_two_pass_kernel_bit_for_bit(backend, kind, reduction, dtype):
    weights = torch.rand(4, 5)
    weights[1] = 0
    options = {"kind": kind, "reduction": reduction, "weights": weights, "backend": backend}
    s1, t1 = pair(dtype)
    s2, t2 = pair(dtype)
    expected = fused_rep_loss(s1, t1, **options)
    expected.backward()
    loss = fused_rep_loss(s2, t2, inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(s2.grad, s1.grad)


def test_the_gradient_is_the_teachers_memory(backend):
    student, teacher = pair()
    h = student * 1.0
    (grad,) = torch.autograd.grad(fused_rep_loss(h, teacher, inplace=True, backend=backend), h)
    assert grad.data_ptr() == teacher.data_ptr()


def test_takes_no_memory_beside_64_bytes_a_row(compiled_backend, peak_bytes):
    m = 16384
    student, teacher = pair(shape=(m, 1024))
    h = student * 1.0

    def step():
        loss = fused_rep_loss(h, teacher, inplace=True, backend=compiled_backend)
        torch.autograd.grad(loss, h)

    extra = peak_bytes(step)
    assert extra <= 64 * m


def test_another_upstream_gradient_raises(backend):
    student, teacher = pair()
    loss = fused_rep_loss(student, teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"no other upstream gradient than 1, got 2\.0"):
        (2 * loss).backward()


def test_second_backward_raises(backend):
    student, teacher = pair()
    loss = fused_rep_loss(student, teacher, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: {"rows": torch.arange(20)}, "rows"),
        (lambda s, t: {"reduction": "none"}, "reduction='none'"),
        (lambda s, t: {"teacher": t.reshape(20, 33)}, "must be alike"),
        (lambda s, t: {"teacher": t.transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
        (lambda s, t: {"teacher": s.detach()}, "share memory"),
        (lambda s, t: {"backend": "reference"}, "no in-place kernel"),
        (
            lambda s, t: {"student_proj": torch.randn(2, 33), "teacher_proj": torch.randn(2, 33)},
            "projected",
        ),
    ],
)
def test_refuses_what_it_cannot_do(backend, change, message):
    student, teacher = pair()
    arguments = {"student": student, "teacher": teacher, "backend": backend, "inplace": True}
    with pytest.raises(ValueError, match=f"inplace=True is not possible.*{message}"):
        fused_rep_loss(**(arguments | change(student, teacher)))
