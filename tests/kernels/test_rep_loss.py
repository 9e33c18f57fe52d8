"""Every combination of options at a few shapes, against the float64 oracle."""

import itertools
from dataclasses import replace

import pytest
import torch

from oprd_kernels import fused_rep_loss
from oprd_kernels.call import GradCall, LossCall
from tests.kernels.oracle import Case, assert_no_worse_than_torch, run

KINDS = ("mse", "nmse", "cosine")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_case(rank=0, dtype=torch.float32, teacher_dtype=None, m=19, d_s=53, d_t=None, **kw):
    torch.manual_seed(0)
    d_t = d_t or (61 if rank else d_s)
    projectors = {}
    if rank:
        projectors = {
            "student_proj": torch.randn(rank, d_s) / d_s**0.5,
            "teacher_proj": torch.randn(rank, d_t) / d_t**0.5,
            "teacher_mean": torch.randn(d_t),
        }
    student = torch.randn(m, d_s).to(dtype)
    teacher = torch.randn(m, d_t).to(teacher_dtype or dtype)
    return Case(student, teacher, **(projectors | kw))


@pytest.mark.parametrize("through_tap", [False, True], ids=["loss", "tap"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rank", [0, 1, 8, 37])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_matches_oracle(backend, kind, dtype, rank, reduction, through_tap):
    case = make_case(rank, dtype, kind=kind, reduction=reduction)
    assert_no_worse_than_torch(case, backend, through_tap)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_teacher_rows_weights_denominator(backend, kind, rank):
    case = make_case(
        rank,
        kind=kind,
        rows=torch.tensor([18, 0, 7, 3]),
        teacher_rows=torch.tensor([2, 2, 5, 0]),
        weights=torch.tensor([1.0, 0.0, 0.5, 2.0]),
        denominator=7,
    )
    assert_no_worse_than_torch(case, backend)
    assert_no_worse_than_torch(case, backend, through_tap=True)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids="-".join)
def test_mixed_dtypes(backend, pair, rank):
    case = make_case(rank, DTYPES[pair[0]], DTYPES[pair[1]])
    assert_no_worse_than_torch(case, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 2047, 2048, 2056, 4099])
def test_widths_around_the_vector_and_block_sizes(backend, width, kind):
    assert_no_worse_than_torch(make_case(m=3, d_s=width, kind=kind), backend)
    assert_no_worse_than_torch(make_case(5, m=6, d_s=width, d_t=width + 1, kind=kind), backend)


def test_teacher_already_projected(backend):
    case = make_case(8)
    teacher = (case.teacher - case.teacher_mean) @ case.teacher_proj.T
    projected = Case(case.student, teacher, case.student_proj)
    assert_no_worse_than_torch(projected, backend)
    assert torch.allclose(run(case, backend).loss, run(projected, backend).loss)


def test_teacher_mean_does_not_cancel(backend):
    """Rows that differ little from a large mean: z_T is accurate to the rows' own rounding."""
    case = make_case(8)
    teacher = 1000 + 0.01 * torch.randn(19, 61)
    mean = teacher.double().mean(0).float()
    case = Case(case.student, teacher, case.student_proj, case.teacher_proj, mean)
    assert_no_worse_than_torch(case, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 8])
def test_masked_rows_may_hold_anything(backend, rank, kind):
    case = make_case(rank, kind=kind, weights=(torch.arange(19) % 3 > 0).float())
    clean = run(case, backend)
    bad = case.weights == 0
    case.student[bad] = torch.nan
    case.teacher[bad] = torch.inf
    dirty = run(case, backend)
    for name, want in vars(clean).items():
        if want is not None:
            assert torch.equal(getattr(dirty, name), want), name
    assert (dirty.grad_student[bad] == 0).all()


def test_nan_in_a_supervised_row_is_not_hidden(backend):
    case = make_case()
    case.student[3, 4] = torch.nan
    result = run(case, backend)
    assert result.loss.isnan()
    assert result.grad_student[3].isnan().all()
    assert result.grad_student[:3].isfinite().all()


def test_nan_of_any_payload_survives_rounding(backend):
    """Rounded by adding half a unit, a NaN of all ones would become -0 in bfloat16."""
    case = make_case(4, dtype=torch.bfloat16)
    case.student_proj[1, 2] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert run(case, backend).grad_student.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_everything_masked_gives_zero(backend, kind, reduction):
    case = make_case(kind=kind, reduction=reduction, weights=torch.zeros(19))
    result = run(case, backend)
    assert result.loss == 0
    assert (result.grad_student == 0).all()
    assert result.stats[3] == 0


def test_denominator_zero_gives_zero(backend):
    result = run(make_case(denominator=0), backend)
    assert result.loss == 0
    assert (result.grad_student == 0).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_no_rows(backend, rank):
    assert_no_worse_than_torch(make_case(rank, m=0), backend)
    case = make_case(rank, m=0)
    some = Case(torch.randn(5, 53), case.teacher, *projectors_of(case), rows=torch.arange(0))
    result = run(some, backend)
    assert result.loss == 0
    assert (result.grad_student == 0).all()


@pytest.mark.parametrize("rank", [0, 4, 40])
def test_no_rows_of_a_batch(backend, rank):
    case = make_case(rank, m=0)
    student, teacher = (x.new_empty(2, 0, x.shape[-1]) for x in (case.student, case.teacher))
    assert_no_worse_than_torch(replace(case, student=student, teacher=teacher), backend)


def projectors_of(case):
    return case.student_proj, case.teacher_proj, case.teacher_mean


def test_zero_rows_follow_the_clamped_norm_rule(backend):
    case = make_case(kind="cosine", reduction="none")
    case.student[1] = 0
    case.teacher[2] = 0
    case.student[3] = case.teacher[3] = 0
    result = run(case, backend)
    assert result.loss[1:4].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert (result.grad_student[1] == 0).all()
    assert_no_worse_than_torch(case, backend)


def test_identical_pairs_give_exactly_zero(backend):
    case = make_case()
    case = Case(case.student, case.student.clone())
    result = run(case, backend)
    assert result.loss == 0
    assert (result.grad_student == 0).all()


@pytest.mark.parametrize("kind", ["nmse", "cosine"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_identical_pairs(backend, kind, distance):
    case = make_case(m=64, d_s=1536, kind=kind)
    teacher = case.student * (1 + distance * torch.randn_like(case.student))
    assert_no_worse_than_torch(Case(case.student, teacher, kind=kind), backend)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1e6, 1e18, 1e30])
@pytest.mark.parametrize("kind", ["nmse", "cosine"])
def test_extreme_norms(backend, kind, scale):
    case = make_case(kind=kind)
    assert_no_worse_than_torch(Case(case.student * scale, case.teacher, kind=kind), backend)
    assert_no_worse_than_torch(Case(case.student, case.teacher * scale, kind=kind), backend)


def test_norms_whose_squares_overflow_float32(backend):
    case = make_case(kind="cosine")
    big = Case(case.student * 1e25, case.teacher * 1e25, kind="cosine")
    assert run(big, backend).loss.item() == pytest.approx(run(case, backend).loss.item(), rel=1e-5)


def strided_variants():
    base = torch.randn(6, 4, 40)
    return {
        "sliced": torch.randn(6, 9, 50)[:, 2:6, 3:43],
        "transposed": torch.randn(4, 6, 40).transpose(0, 1),
        "last dimension strided": torch.randn(6, 4, 80)[..., ::2],
        "last dimension first": torch.randn(40, 6, 4).permute(1, 2, 0),
        "expanded": torch.randn(1, 1, 40).expand(6, 4, 40),
        "expanded batches": torch.randn(1, 4, 40).expand(6, 4, 40),
        "four dimensions": base.reshape(2, 3, 4, 40),
        "fortran": torch.randn(40, 24).T.reshape(6, 4, 40),
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("layout", strided_variants().keys())
def test_any_strides(backend, layout, dtype):
    torch.manual_seed(0)
    student = strided_variants()[layout].to(dtype)
    teacher = torch.randn(student.shape).to(dtype)
    assert_no_worse_than_torch(Case(student, teacher), backend)
    assert_no_worse_than_torch(Case(teacher, student), backend)
    assert_no_worse_than_torch(Case(student, teacher), backend, through_tap=True)


def test_none_has_the_leading_shape(backend):
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    loss = fused_rep_loss(student, teacher, reduction="none", backend=backend)
    assert loss.shape == (2, 3)
    rows = torch.tensor([0, 4])
    loss = fused_rep_loss(student, teacher[0, :2], rows=rows, reduction="none", backend=backend)
    assert loss.shape == (2,)


def test_one_row_without_leading_dimensions(backend):
    s, t = torch.randn(8, requires_grad=True), torch.randn(8)
    loss = fused_rep_loss(s, t, kind="mse", backend=backend)
    loss.backward()
    assert torch.allclose(loss, (s - t).square().mean())
    assert torch.allclose(s.grad, 2 * (s - t) / 8)


@pytest.mark.parametrize("rank", [0, 8])
def test_same_bits_on_any_number_of_threads(compiled_backend, rank):
    case = make_case(rank, m=301, d_s=1031, d_t=517 if rank else None)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run(case, compiled_backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        assert torch.equal(other.grad_student, results[0].grad_student)


@pytest.mark.parametrize("rank", [0, 8])
def test_nothing_as_wide_as_an_activation_in_forward(compiled_backend, rank, peak_bytes):
    """16,384 rows of 1,024 floats are 64 MiB; forward may take r + 16 floats a row."""
    m = 16384
    case = make_case(rank, m=m, d_s=1024, d_t=1024)
    student = case.student.requires_grad_()
    kwargs = case.kwargs() | {"student_proj": case.student_proj, "backend": compiled_backend}
    fused_rep_loss(student[:64], case.teacher[:64], **kwargs)
    extra = peak_bytes(lambda: fused_rep_loss(student, case.teacher, **kwargs))
    assert extra <= (rank + 16) * 4 * m


def test_offsets_past_2_31_elements(backend):
    """Rows at the end of a tensor of 2^31 + elements; pages that are not touched cost nothing."""
    d, last = 1025, 2**31 // 1025 + 5
    big = torch.empty(last + 1, d)
    assert big.numel() > 2**31
    rows = torch.tensor([last, last - 3])
    big[rows] = torch.randn(2, d)
    small, teacher = big[rows].requires_grad_(), torch.randn(2, d)
    expected = fused_rep_loss(small, teacher, backend=backend)
    expected.backward()
    call = LossCall(big, teacher, rows=rows)
    loss, saved = torch.ops.oprd.rep_loss(*call, backend)
    grad = torch.empty_like(big)
    torch.ops.oprd.rep_loss_grad_(
        grad, False, torch.ones(()), *GradCall(saved, big, teacher, rows=rows), backend
    )
    assert torch.equal(loss, expected)
    assert torch.equal(grad[rows], small.grad)
