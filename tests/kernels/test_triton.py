"""The Triton backend where the common suite does not reach: traffic, wide rows, few rows."""

import pytest
import torch

from oprd_kernels import triton_backend
from tests.kernels.oracle import assert_no_worse_than_torch
from tests.kernels.test_rep_loss import make_case

if not triton_backend.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is not set: these count accesses", allow_module_level=True)

from benchmarks import gpu_traffic, interpreter
from oprd_kernels.triton_backend import backend, configs, identity


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("regime", gpu_traffic.REGIMES, ids=lambda r: f"{r.name} {r.rank}")
def test_activations_move_no_more_than_they_must(regime, dtype):
    traffic = gpu_traffic.count(regime, dtype)
    assert traffic.floor <= traffic.activations <= 1.05 * traffic.floor


@pytest.mark.parametrize("regime", gpu_traffic.REGIMES[::2], ids=lambda r: f"{r.name} {r.rank}")
def test_traffic_follows_the_rows_picked(regime):
    if regime.name.endswith("in place"):
        pytest.skip("in place takes no row index")
    rows = torch.randperm(4 * gpu_traffic.ROWS)[: gpu_traffic.ROWS]
    traffic = gpu_traffic.count(regime, "bf16", rows)
    assert traffic.floor <= traffic.activations <= 1.05 * traffic.floor


@pytest.fixture
def narrow_registers(monkeypatch):
    """Rows of 53 take the kernel for rows wider than registers, in blocks of 16."""
    monkeypatch.setattr(configs, "row", lambda generation, width, itemsize: None)
    monkeypatch.setattr(configs, "WIDE_BLOCK", 16)
    monkeypatch.setattr(configs, "piece", lambda generation, itemsize, warps: 16)


@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
def test_rows_wider_than_registers(narrow_registers, kind):
    with interpreter.recorded() as launches:
        assert_no_worse_than_torch(make_case(kind=kind), "triton")
    assert "identity_forward_wide" in [launch.kernel for launch in launches]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, 40, 200, 300])
def test_few_rows_split_the_width(monkeypatch, rank, dtype):
    """As on a chip of 64 multiprocessors: several programs a row, summed in order."""
    monkeypatch.setattr(backend, "processors", lambda _: 64)
    case = make_case(rank, dtype, m=5, d_s=531, d_t=600)
    with interpreter.recorded() as launches:
        assert_no_worse_than_torch(case, "triton")
    assert "compare" in [launch.kernel for launch in launches]
    assert "projected_forward" not in [launch.kernel for launch in launches]


def test_few_rows_of_a_projected_teacher(monkeypatch):
    monkeypatch.setattr(backend, "processors", lambda _: 64)
    case = make_case(6, m=5, d_s=531, d_t=6, teacher_proj=None, teacher_mean=None)
    assert_no_worse_than_torch(case, "triton")


def test_many_rows_are_summed_in_chunks(monkeypatch):
    monkeypatch.setattr(backend, "CHUNK", 16)
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
