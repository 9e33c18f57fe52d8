"""The Triton backend where the common suite does not reach: traffic, wide rows, few rows."""

from types import SimpleNamespace

import pytest
import torch

from oprd_kernels.backends import triton as triton_backend
from tests.kernels.oracle import assert_no_worse_than_torch, run
from tests.kernels.test_rep_loss import make_case

if not triton_backend.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is not set: these count accesses", allow_module_level=True)

from benchmarks import gpu_traffic, interpreter
from oprd_kernels.backends.triton import backend, configs, identity, launches
from oprd_kernels.backends.triton.operands import RANK_BLOCK


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("regime", gpu_traffic.REGIMES, ids=lambda r: f"{r.name} {r.rank}")
def test_activations_move_no_more_than_they_must(regime, dtype):
    traffic = gpu_traffic.count(regime, dtype)
    times = reads_of_states(regime)
    assert traffic.floor <= traffic.activations / times <= 1.05 * traffic.floor


@pytest.mark.slow
@pytest.mark.parametrize("regime", gpu_traffic.REGIMES[::2], ids=lambda r: f"{r.name} {r.rank}")
def test_traffic_follows_the_rows_picked(regime):
    if regime.name.endswith("in place"):
        pytest.skip("in place takes no row index")
    rows = torch.randperm(4 * gpu_traffic.ROWS)[: gpu_traffic.ROWS]
    traffic = gpu_traffic.count(regime, "bf16", rows)
    times = reads_of_states(regime)
    assert traffic.floor <= traffic.activations / times <= 1.05 * traffic.floor


def reads_of_states(regime):
    """Forward takes ranks in blocks: neighbouring programs, which read the same states, the later
    ones out of L2."""
    return -(-regime.rank // RANK_BLOCK) if regime.name == "projected forward" else 1


@pytest.fixture
def narrow_registers(monkeypatch):
    """Rows of 53 take the kernel for rows wider than registers, in blocks of 16."""
    monkeypatch.setattr(configs, "row", lambda generation, width, itemsize: None)
    monkeypatch.setattr(configs, "WIDE_BLOCK", 16)
    monkeypatch.setattr(configs, "piece", lambda generation, itemsize, warps: 16)


@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
def test_rows_wider_than_registers(narrow_registers, kind):
    with interpreter.recorded() as recorded:
        assert_no_worse_than_torch(make_case(kind=kind), "triton")
    assert "identity_forward_wide" in [launch.kernel for launch in recorded]
    big = make_case(kind=kind)
    big.student[2] *= 1e25
    big.teacher[3] *= 1e25
    big.student[4] = 0
    if kind != "mse":
        assert_no_worse_than_torch(big, "triton")


def test_wide_rows_in_place(narrow_registers):
    from oprd_kernels import fused_rep_loss

    case = make_case()
    student = case.student.clone().requires_grad_()
    expected = torch.autograd.grad(fused_rep_loss(student, case.teacher, backend="triton"), student)
    teacher = case.teacher.clone()
    loss = fused_rep_loss(student, teacher, backend="triton", inplace=True)
    assert torch.equal(*torch.autograd.grad(loss, student), *expected)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize(
    "rank", [3, 40, *(pytest.param(r, marks=pytest.mark.slow) for r in (200, 300))]
)
def test_few_rows_split_the_width(monkeypatch, rank, dtype):
    """As on a chip of 64 multiprocessors: several programs a row, summed in order."""
    monkeypatch.setattr(backend, "processors", lambda _: 64)
    case = make_case(rank, dtype, m=5, d_s=531, d_t=600)
    with interpreter.recorded() as recorded:
        assert_no_worse_than_torch(case, "triton")
    assert "compare" in [launch.kernel for launch in recorded]
    assert "projected_forward" not in [launch.kernel for launch in recorded]


def test_few_rows_of_a_projected_teacher(monkeypatch):
    monkeypatch.setattr(backend, "processors", lambda _: 64)
    case = make_case(6, m=5, d_s=531, d_t=6, teacher_proj=None, teacher_mean=None)
    assert_no_worse_than_torch(case, "triton")


def test_many_rows_are_summed_in_chunks(monkeypatch):
    monkeypatch.setattr(launches, "CHUNK", 16)
    case = make_case(m=150, d_s=8, weights=torch.rand(150).round())
    assert_no_worse_than_torch(case, "triton")


def test_an_access_outside_the_tensors_is_caught():
    """The check that the other tests rely on: launch a kernel that believes in one row more."""
    x = torch.randn(4, 32)
    saved = torch.empty(1000)
    pointers = [(x,), (x.clone(),), None, torch.empty(()), saved, None, None, None, None]
    rows = (5, 0, 32, 1)
    with pytest.raises(Exception, match="outside"):
        identity.identity_forward[(5,)](
            *pointers, 0, 5, *rows, *rows, *rows, KIND=1, MEAN=True, EACH=False, WIDTH=32, D=32,
            N=1, UNIT=1, FLAT=True, DENSE=True,
        )  # fmt: skip


@pytest.mark.parametrize("rank", [8, 40])
def test_long_sums_leave_the_tensor_core(rank):
    """Summed over all of d in its accumulator, which cuts off, six exact products would come to ten
    times the error of float32: `interpreter.tensor_core` cuts off as it does."""
    case = make_case(rank, m=6, d_s=2048, d_t=1536, kind="mse", reduction="none")
    assert_no_worse_than_torch(case, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_of_16_bit_states(dtype):
    case = make_case(8, dtype, m=6, d_s=2048, d_t=1536, kind="mse", reduction="none")
    assert_no_worse_than_torch(case, "triton")


def errors_at(precision, case):
    """Errors of loss and gradients, relative to the largest value, at a matmul precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = run(case, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    exact = run(case.in_float64(), "reference")
    names = ("loss", "grad_student", "grad_proj")
    pairs = [(getattr(ours, n).double(), getattr(exact, n).double()) for n in names]
    return [float((x - want).abs().max() / want.abs().max()) for x, want in pairs]


@pytest.mark.parametrize("rank", [8, 40])
def test_float32_products_follow_the_matmul_precision(rank):
    """One, three or six bfloat16 products: 8, 16 or 24 bits."""
    case = make_case(rank, m=16, d_s=256, d_t=192, kind="mse", reduction="none")
    medium, high, highest = (errors_at(p, case) for p in ("medium", "high", "highest"))
    assert all(2**-14 < error < 2**-5 for error in medium)
    assert all(2**-22 < error < 2**-13 for error in high)
    assert all(error < 2**-19 for error in highest)
    assert all(a > 2 * b for a, b in zip(high, highest, strict=True))


def test_sums_of_programs_are_added_in_their_order(monkeypatch):
    """A projection of many blocks of rows, a reduction of many chunks: each one launch, and the
    same bits as long as the blocks are the same."""
    monkeypatch.setattr(launches, "CHUNK", 16)
    for rank in (0, 4):
        case = make_case(rank, m=200, d_s=24, d_t=40 if rank else None, weights=torch.rand(200))
        with interpreter.recorded() as recorded:
            first = run(case, "triton")
        names = [launch.kernel for launch in recorded]
        assert len(names) == len(set(names)) == (3 if not rank else 4), names
        again = run(case, "triton")
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(first.stats, again.stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_rows_of_a_projector_of_any_scale_learn(rank, dtype):
    """As a row does that begins at zero."""
    case = make_case(rank, dtype, m=40, kind="mse")
    for k, scale in enumerate((1e-3, 1e-8, 0.0)):
        case.student_proj[k] *= scale
    assert_no_worse_than_torch(case, "triton")
    ours, exact = run(case, "triton").grad_proj, run(case.in_float64(), "reference").grad_proj
    error = (ours.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error < 2**-9).all()


def test_precision_set_by_its_newer_name(monkeypatch):
    """After that, the older name refuses to tell."""

    def refuses():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    assert backend.float32_precision(torch.bfloat16) == "highest"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert backend.float32_precision(torch.float32) == "high"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    assert backend.float32_precision(torch.float32, torch.bfloat16) == "highest"
