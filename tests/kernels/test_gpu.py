"""``pytest -m gpu``: the fused backends on a real GPU, by the same rule as everywhere.

Nearly all of the time is Triton's compilation. So kinds, dtypes, reductions and ranks are not run
in every combination, but so that every two of them meet (tests/benchmarks/test_on_gpu.py holds
that), each case once for the loss and once through the tap.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from oprd_kernels import fused_rep_loss, fused_rep_losses, rep_tap
from oprd_kernels.backends import registry
from oprd_kernels.backends.protocol import BackendUnavailable
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


@pytest.fixture(params=[b for b in registry.BACKENDS if b not in ("cpu", "reference")])
def gpu_backend(request):
    if reason := registry.unavailable(request.param, torch.device("cuda")):
        pytest.skip(reason)
    return request.param


def check(case, backend, through_tap=False):
    try:
        assert_no_worse_than_torch(case, backend, through_tap, device="cuda")
    except BackendUnavailable as reason:
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
    except BackendUnavailable as reason:
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
    count = torch.full((), 8, device="cuda")
    step(student, teacher, rows, gpu_backend, count)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, rows, gpu_backend, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(student, teacher, rows, backend, count=None):
    h, loss = rep_tap(student * 1, teacher, rows=rows, denominator=count, backend=backend)
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


ROWS = 5000
"""More than one program sums up: the last to draw a ticket adds all sums."""
WIDTH = 1536


class Work(NamedTuple):
    """A call to repeat: `call` gives loss and gradients of what is in ``inputs`` now."""

    inputs: list[Tensor]
    call: Callable[[], list[Tensor]]


def normal(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


def loss_and_gradients(loss, *leaves):
    # detach(): what a graph writes into is compared later, without its history.
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def pair_work(student, teacher, backend, **options):
    """Of a loss between these; ``student`` may be a view of another tensor."""

    def call():
        leaf = student.detach().requires_grad_()
        return loss_and_gradients(fused_rep_loss(leaf, teacher, backend=backend, **options), leaf)

    return Work([student, teacher], call)


def identity_work(backend, device, m, width):
    x, y = (normal(m, width, device=device) for _ in range(2))
    return pair_work(x, y, backend)


def in_place_work(backend, device, m, width):
    x, y = (normal(m, width, device=device) for _ in range(2))
    weights = torch.rand(m, device=device)

    def call():
        # Of the teacher, which is written over, a new copy each time.
        leaf, teacher = x.detach().requires_grad_(), y.clone()
        options = {"weights": weights, "inplace": True, "backend": backend}
        return loss_and_gradients(fused_rep_loss(leaf, teacher, **options), leaf)

    return Work([x, y, weights], call)


def bridge_work(rank):
    def make(backend, device, m, width):
        x, y = normal(m, width, device=device), normal(m, width + 512, device=device)
        # float32, trained: its gradient is summed over the rows too.
        float32 = {"dtype": torch.float32, "device": device}
        student_proj, teacher_proj = (
            normal(rank, width, **float32),
            normal(rank, width + 512, **float32),
        )

        def call():
            leaf, proj = x.detach().requires_grad_(), student_proj.detach().requires_grad_()
            projs = {"student_proj": proj, "teacher_proj": teacher_proj}
            loss = fused_rep_loss(leaf, y, backend=backend, **projs)
            return loss_and_gradients(loss, leaf, proj)

        return Work([x, y, student_proj, teacher_proj], call)

    return make


def layers_work(backend, device, m, width, layers=40):
    xs = [normal(m, width // 6, device=device) for _ in range(2 * layers)]
    scale = torch.linspace(0.5, 1.5, layers, device=device)

    def call():
        leaves = [x.detach().requires_grad_() for x in xs[:layers]]
        losses = fused_rep_losses(leaves, xs[layers:], backend=backend)
        return [losses.detach(), *torch.autograd.grad((losses * scale).sum(), leaves)]

    return Work(xs, call)


def mixed_work(backend, device, m, width):
    x = normal(m, width, device=device)
    return pair_work(x, normal(m, width, dtype=torch.float32, device=device), backend)


def expanded_work(backend, device, m, width):
    x, y = normal(1, width, device=device), normal(m, width, device=device)
    view = pair_work(x.expand(m, width), y, backend)
    return Work([x, y], view.call)


def column_major_work(backend, device, m, width):
    x = normal(width, m, device=device).T
    return pair_work(x, normal(m, width, device=device), backend)


WORKS = {
    "identity": identity_work,
    "in place, weights": in_place_work,
    "bridge 8": bridge_work(8),
    "bridge 64": bridge_work(64),
    "40 layers": layers_work,
    "mixed dtypes": mixed_work,
    "expanded": expanded_work,
    "column-major": column_major_work,
}


@pytest.fixture(params=WORKS)
def make_work(request, gpu_backend):
    """Makes the same work with other numbers each time; compiled, or skipped if the backend leaves
    it to another."""

    def make(seed, device="cuda", m=ROWS, width=WIDTH):
        torch.manual_seed(seed)
        return WORKS[request.param](gpu_backend, device, m, width)

    try:
        make(0).call()
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    return make


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert theirs.isfinite().all()
        assert theirs.any()
        assert torch.equal(ours, theirs), f"tensor {i}: {(ours - theirs).abs().max():.3g} off"


def renew(work, seed):
    """Other numbers in the same memory."""
    torch.manual_seed(seed)
    for x in work.inputs:
        x.copy_(torch.rand_like(x) if x.dim() == 1 else torch.randn_like(x))


def captured(work, stream):
    """A graph of the call, captured on ``stream``, and the tensors it writes."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = work.call()
    return graph, results


def at_once(streams, *queued):
    """What the functions queue, each on a stream of its own, runs at the same time: behind a kernel
    that sleeps until all of it is queued."""
    main = torch.cuda.current_stream()
    for stream, function in zip(streams, queued, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(40_000_000)  # some 20 ms
            function()
    for stream in streams:
        main.wait_stream(stream)
    torch.cuda.synchronize()


def test_replays_give_the_bits_of_a_call(make_work):
    work = make_work(1)
    graph, results = captured(work, torch.cuda.Stream())
    for seed in range(2, 5):
        renew(work, seed)
        graph.replay()
        assert_same_bits(results, work.call())


def test_two_streams_at_once_give_the_bits_of_one(make_work):
    works = [make_work(seed) for seed in (1, 2)]
    wanted = [work.call() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    found = [[], []]

    def queue(work, results):
        return lambda: results.extend(work.call() for _ in range(3))

    at_once(streams, *map(queue, works, found))
    for all_results, expected in zip(found, wanted, strict=True):
        assert len(all_results) == 3
        for results in all_results:
            assert_same_bits(results, expected)


def test_two_replays_at_once_give_the_bits_of_one(make_work):
    works = [make_work(seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in works]
    graphs, results = zip(*map(captured, works, streams), strict=True)
    for seed in (3, 5, 7):
        for i, work in enumerate(works):
            renew(work, seed + i)
        at_once(streams, *(graph.replay for graph in graphs))
        for work, found in zip(works, results, strict=True):
            assert_same_bits(found, work.call())


@pytest.mark.parametrize("layout", ["expanded", "column-major"])
def test_a_student_with_other_strides_is_its_contiguous_copy(gpu_backend, layout):
    torch.manual_seed(0)
    work = WORKS[layout](gpu_backend, "cuda", ROWS, WIDTH)
    student = work.inputs[0].expand(ROWS, WIDTH)
    dense = pair_work(student.contiguous(), work.inputs[1], gpu_backend)
    try:
        found = work.call()
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    for ours, wanted in zip(found, dense.call(), strict=True):
        assert_same_to_rounding(ours, wanted)
