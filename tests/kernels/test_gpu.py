"""``pytest -m gpu``: the fused backends on a real GPU, by the same rule as everywhere.

Nearly all of the time is Triton's compilation. So kinds, dtypes, reductions and ranks are not run
in every combination, but so that every two of them meet (tests/test_on_gpu.py holds that), each
case once for the loss and once through the tap.
"""

import os

import pytest
import torch

from oprd_kernels import backends, fused_rep_loss, fused_rep_losses, rep_tap
from tests.kernels.oracle import Case, assert_no_worse_than_torch
from tests.kernels.test_rep_loss import DTYPES, KINDS, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

REDUCTIONS = ("mean", "sum", "none")
RANKS = (0, 1, 8, 16, 32, 37, 128, 256, 300)
"""At, between and above the sizes of the kernels' blocks."""
OPTIONS = [
    (rank, dtype, KINDS[(i + j) % 3], REDUCTIONS[(i + 2 * j) % 3])
    for i, rank in enumerate(RANKS)
    for j, dtype in enumerate(DTYPES)
]
SHAPES = [
    (rank, width, m, list(DTYPES)[(i + j + k) % 3])
    for i, rank in enumerate((0, 8, 64, 256))
    for j, width in enumerate((1536, 2050, 4096))
    for k, m in enumerate((3, 1000))
]


def name_of(value):
    """A parameter in a test's name."""
    return str(value)


@pytest.fixture(autouse=True)
def one_thread_a_worker():
    """The oracles of pytest-xdist's workers would share the cores with all their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else before)
    yield
    torch.set_num_threads(before)


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


def check_both(case, backend):
    check(case, backend)
    check(case, backend, through_tap=True)


@pytest.mark.parametrize(("rank", "dtype", "kind", "reduction"), OPTIONS, ids=name_of)
def test_matches_oracle(gpu_backend, rank, dtype, kind, reduction):
    check_both(make_case(rank, DTYPES[dtype], kind=kind, reduction=reduction), gpu_backend)


@pytest.mark.parametrize(("rank", "width", "m", "dtype"), SHAPES, ids=name_of)
def test_real_widths(gpu_backend, rank, width, m, dtype):
    d_t = width + 512 if rank else None
    check_both(make_case(rank, DTYPES[dtype], m=m, d_s=width, d_t=d_t), gpu_backend)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 8, 64, 256])
def test_more_rows_than_the_gpu_has_processors_for(gpu_backend, rank, dtype):
    """Kernels may go about many rows in another way than about few."""
    d_t = 96 if rank else None
    check(make_case(rank, DTYPES[dtype], m=33000, d_s=64, d_t=d_t), gpu_backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 8, 64])
def test_rows_teacher_rows_weights_denominator(gpu_backend, rank, kind):
    case = make_case(
        rank,
        kind=kind,
        rows=torch.tensor([18, 0, 7, 3]),
        teacher_rows=torch.tensor([2, 2, 5, 0]),
        weights=torch.tensor([1.0, 0.0, 0.5, 2.0]),
        denominator=7,
    )
    check_both(case, gpu_backend)


def states(m, d, dtype, count=1):
    torch.manual_seed(0)
    return [torch.randn(m, d).to("cuda", dtype) for _ in range(count)]


def assert_same_to_rounding(ours, wanted):
    """Two kernels may sum in another order: a unit in the last place each."""
    limit = 4 * torch.finfo(wanted.dtype).eps * wanted.abs()
    assert ((ours - wanted).abs() <= limit + 1e-6 * wanted.abs().max()).all()


@pytest.mark.parametrize(("dtype", "kind"), list(zip(DTYPES, KINDS, strict=True)), ids=name_of)
def test_in_place_is_the_gradient_in_a_new_tensor(gpu_backend, dtype, kind):
    student, teacher = states(100, 1536, DTYPES[dtype], 2)
    student.requires_grad_()
    options = {"kind": kind, "backend": gpu_backend}
    loss = fused_rep_loss(student, teacher, **options)
    wanted = torch.autograd.grad(loss, student)[0]
    again = fused_rep_loss(student, teacher, inplace=True, **options)
    found = torch.autograd.grad(again, student)[0]
    assert found.data_ptr() == teacher.data_ptr()
    assert_same_to_rounding(again.detach(), loss.detach())
    assert_same_to_rounding(found, wanted)


@pytest.mark.parametrize(("dtype", "rank"), [("fp32", 0), ("bf16", 0), ("fp32", 8), ("bf16", 64)])
def test_layers_at_once_are_the_layers_one_by_one(gpu_backend, dtype, rank):
    students = [x.requires_grad_() for x in states(50, 1536, DTYPES[dtype], 5)]
    teachers = states(50, 1536, DTYPES[dtype], 10)[5:]
    lists = {}
    if rank:
        projectors = states(rank, 1536, torch.float32, 10)
        lists = {"student": projectors[:5], "teacher": projectors[5:]}
    upstream = torch.linspace(0.5, 1.5, 5, device="cuda")
    plural = {f"{name}_projs": column for name, column in lists.items()}
    single = [{f"{name}_proj": column[i] for name, column in lists.items()} for i in range(5)]
    try:
        losses = fused_rep_losses(students, teachers, backend=gpu_backend, **plural)
    except backends.BackendUnavailable as reason:
        pytest.skip(str(reason))
    wanted = [
        fused_rep_loss(s, t, backend=gpu_backend, **one)
        for s, t, one in zip(students, teachers, single, strict=True)
    ]
    assert_same_to_rounding(losses.detach(), torch.stack(wanted).detach())
    found = torch.autograd.grad((losses * upstream).sum(), students)
    expected = torch.autograd.grad((torch.stack(wanted) * upstream).sum(), students)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_to_rounding(ours, theirs)


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
