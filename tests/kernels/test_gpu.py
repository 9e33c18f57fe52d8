"""``pytest -m gpu``: the fused backends on a real GPU, by the same rule as everywhere."""

import pytest
import torch

from oprd_kernels import backends, fused_rep_loss, rep_tap
from tests.kernels.oracle import Case, assert_no_worse_than_torch
from tests.kernels.test_rep_loss import DTYPES, KINDS, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.fixture(params=[b for b in backends.BACKENDS if b not in ("cpu", "reference")])
def gpu_backend(request):
    if reason := backends.unavailable(request.param, torch.device("cuda")):
        pytest.skip(reason)
    return request.param


def check(case, backend, through_tap=False):
    try:
        assert_no_worse_than_torch(case, backend, through_tap, device="cuda")
    except backends.BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("through_tap", [False, True], ids=["loss", "tap"])
@pytest.mark.parametrize("rank", [0, 1, 8, 16, 37, 128, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_matches_oracle(gpu_backend, kind, dtype, rank, through_tap):
    check(make_case(rank, dtype, kind=kind), gpu_backend, through_tap)


@pytest.mark.parametrize("rank", [0, 8, 64, 256])
@pytest.mark.parametrize("m", [3, 1000])
@pytest.mark.parametrize("width", [1536, 2050, 4096])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_real_widths(gpu_backend, dtype, width, m, rank):
    case = make_case(rank, dtype, m=m, d_s=width, d_t=width + 512 if rank else None)
    check(case, gpu_backend)
    check(case, gpu_backend, through_tap=True)


@pytest.mark.parametrize("scale", [1e-6, 1e18, 1e30])
def test_extreme_norms(gpu_backend, scale):
    case = make_case(d_s=1536)
    check(Case(case.student * scale, case.teacher), gpu_backend)


@pytest.mark.parametrize("distance", [1e-2, 1e-6])
def test_nearly_identical_pairs(gpu_backend, distance):
    case = make_case(m=64, d_s=1536)
    teacher = case.student * (1 + distance * torch.randn_like(case.student))
    check(Case(case.student, teacher), gpu_backend)


def test_identical_pairs_give_exactly_zero(gpu_backend):
    student = torch.randn(64, 1536, device="cuda").requires_grad_()
    loss = fused_rep_loss(student, student.detach().clone(), backend=gpu_backend)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_same_bits_every_time(gpu_backend):
    student = torch.randn(5000, 1536, device="cuda", dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn_like(student)
    losses = [fused_rep_loss(student, teacher, backend=gpu_backend) for _ in range(5)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    assert all(torch.equal(x, losses[0]) for x in losses)
    assert all(torch.equal(x, gradients[0]) for x in gradients)


def test_never_waits_for_the_device(gpu_backend):
    student = torch.randn(64, 1536, device="cuda").requires_grad_()
    teacher, rows = torch.randn(8, 1536, device="cuda"), torch.arange(8, device="cuda")
    step(student, teacher, rows, gpu_backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, rows, gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(student, teacher, rows, backend):
    h, loss = rep_tap(student * 1, teacher, rows=rows, backend=backend)
    return torch.autograd.grad([h.sum(), loss], student)[0]


def test_captured_in_a_cuda_graph(gpu_backend):
    student = torch.randn(64, 1536, device="cuda").requires_grad_()
    teacher, rows = torch.randn(8, 1536, device="cuda"), torch.arange(8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(student, teacher, rows, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, rows, gpu_backend)
    teacher.copy_(torch.randn_like(teacher))
    graph.replay()
    assert torch.equal(captured, step(student, teacher, rows, gpu_backend))
