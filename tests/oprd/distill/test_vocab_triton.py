"""The Triton kernels of the chunked losses: interpreted, compiled for sm_90, and on a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from oprd.distill import vocab_triton
from oprd.distill.chunked import chunked
from oprd.distill.vocab_losses import VocabLoss
from oprd.models.lm_head import HeadRows, LMHead
from oprd_kernels.backends import triton as triton_backend

FORMS = ("top1", "topk_advantage", "topk_raw", "full", "full_forward")
M, V, W = 5, 2500, 2300
interpreted = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="TRITON_INTERPRET is not set"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def rows(spread=2.0, far=0.0):
    torch.manual_seed(0)
    student = spread * torch.randn(M, V) + far
    teacher = spread * torch.randn(M, W) - far
    return student, teacher, torch.randint(W, (M,)), torch.rand(M, 1)


def by_autograd(loss, student, teacher, tokens, scale, cap):
    """Losses and gradient in float64; ``student`` are the products before the cap."""
    wide = student.double().requires_grad_()
    capped = wide if cap is None else cap * (wide / cap).tanh()
    losses = loss.row_losses(capped[:, :W], teacher.double(), tokens)
    (losses * scale.double().squeeze(-1)).sum().backward()
    return losses.detach(), wide.grad


@interpreted
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_give_the_gradient_of_autograd(form, cap):
    loss = VocabLoss(form, 5, "teacher" if cap else "student", 0.7)
    student, teacher, tokens, scale = rows()
    expected, expected_gradient = by_autograd(loss, student, teacher, tokens, scale, cap)
    logits = student.clone() if cap is None else cap * (student / cap).tanh()
    losses, gradient = vocab_triton.row_gradient(loss, logits, teacher, tokens, scale, cap)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)
    assert not gradient[:, W:].any()


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_logits_far_below_zero_and_a_narrow_gradient(form):
    """The columns beyond the vocabulary must not win a row's maximum."""
    loss = VocabLoss(form, 5)
    student, teacher, tokens, scale = rows(far=-300.0)
    expected, expected_gradient = by_autograd(loss, student, teacher, tokens, scale, None)
    losses, gradient = vocab_triton.row_gradient(
        loss, student, teacher, tokens, scale, dtype=torch.bfloat16
    )
    assert gradient.dtype == torch.bfloat16
    assert torch.allclose(losses.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=2e-2, atol=1e-6)


COMPILE = """
import json
import torch
from benchmarks.gpu_triton import compile_only
from oprd.distill import vocab_triton
from oprd.distill.vocab_losses import VocabLoss
rows = [torch.zeros(4, 151936) for _ in range(2)]
tokens, scale = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1)
with compile_only("sm90") as kernels:
    for form in ("top1", "full", "full_forward"):
        for cap in (None, 30.0):
            vocab_triton.row_gradient(VocabLoss(form), *rows, tokens, scale, cap, torch.bfloat16)
print(json.dumps([[k.metadata.name, k.asm["ptx"]] for k in kernels]))
"""


@pytest.mark.slow
def test_kernels_compile_for_sm_90():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in kernels} == {"_statistics", "_gradient"}
    for name, ptx in kernels:
        assert "ld.global.v4" in ptx, f"{name} does not load 128 bits at a time"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [*FORMS, "topk"])
def test_chunked_losses_on_a_gpu(form, dtype):
    """Against the same in float64 on the CPU, from the same bfloat16 or float32 inputs."""
    torch.manual_seed(0)
    m, d, v = 300, 256, 5000
    h, t = (torch.randn(m, d).to(dtype) for _ in range(2))
    w, q = (0.1 * torch.randn(n, d).to(dtype) for n in (v, v - 100))
    tokens = torch.randint(v - 100, (m,))
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        states, weight = (x.to(device, kind).requires_grad_() for x in (h, w))
        teacher = HeadRows(LMHead(q.to(device, kind)), t.to(device, kind))
        head = LMHead(weight)
        loss = VocabLoss(form, k=8)
        value = chunked(loss, states, head, teacher, tokens.to(device), None, float(m), 128)
        value.backward()
        results.append([x.detach().cpu().double() for x in (value, states.grad, weight.grad)])
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()
