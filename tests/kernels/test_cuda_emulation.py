"""The emulation finds the mistakes it is there for; and what it shows of the CUDA kernels beyond
the common suite: bytes moved, any schedule, vectors of 16 bytes, the variants for wide rows."""

import pytest
import torch

from oprd_kernels.backends.cuda import BACKEND as CUDA
from oprd_kernels.call import GradCall, LossCall
from tests.kernels.oracle import Case, assert_no_worse_than_torch, run

pytestmark = pytest.mark.usefixtures("emulated")

KINDS = ("mse", "nmse", "cosine")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = {
    "warp, vectors": 96,
    "warp, elements": 97,
    "block, vectors": 1536,
    "block, elements": 1037,
    "wide, vectors": 16640,
    "wide, elements": 8205,
}
"""Each kernel variant for comparing rows as they are, whatever the dtype."""


def region(x, mode="rw"):
    return ("data", mode, x.data_ptr(), x.element_size(), x.shape, x.stride())


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing_barrier", "data race on shared memory|nobody wrote: .*shared memory"),
        ("warp_barrier_across_warps", "data race on shared memory|nobody wrote: .*shared memory"),
        ("race_between_blocks", r"data race on global memory \(data\): .* no barrier between"),
        ("past_the_end", r"out of bounds: .* global memory that no tensor has; 400 bytes from"),
        ("past_the_shared_end", "out of bounds: .* shared memory at offset 256 of 256"),
        ("unwritten_shared", "nobody wrote: .*, shared memory at offset"),
        ("misaligned_vector", "misaligned: .* 16 bytes of global memory"),
        ("divergent_barrier", "divergent synchronisation: .* wait for the block .* have ended"),
        ("two_barriers_for_one", r"divergent synchronisation: .*faulty\.cpp:\d+, 32 on wait"),
        ("divergent_shuffle", "divergent synchronisation: .* wait for the warp"),
        ("reads_before_barrier", r"data race on global memory \(data\)"),
        ("writes_after_counting", r"data race on global memory \(data\)"),
        ("does_not_count", r"data race on global memory \(data\)"),
        ("reads_the_counter", r"data race on global memory \(data\): .* counter"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_finds(emulated, kernel, message, seed):
    emulated.seed(seed)
    data = torch.zeros(128)[:100]
    emulated.allow([region(data)])
    with pytest.raises(RuntimeError, match=f"oprd CUDA kernel {kernel} on 100 rows of float32"):
        emulated.run_faulty(kernel, data.data_ptr(), 100)
    with pytest.raises(RuntimeError, match=message):
        emulated.run_faulty(kernel, data.data_ptr(), 100)


def test_finds_nothing_wrong_with_a_correct_kernel(emulated):
    data = torch.arange(128.0)
    emulated.allow([region(data)])
    emulated.run_faulty("correct", data.data_ptr(), 128)
    expected = torch.arange(128.0).reshape(2, 64).roll(-1, 1).flatten()
    assert torch.equal(data, expected)


def test_finds_nothing_wrong_with_blocks_that_count_themselves(emulated):
    for seed in range(5):
        emulated.seed(seed)
        data = torch.zeros(1024)
        emulated.allow([region(data)])
        emulated.run_faulty("gathers", data.data_ptr(), 1024)
        assert (data[2:18] == 1).all()


@pytest.mark.parametrize(
    ("mode", "message"), [("r", "write to read-only"), ("w", "memory nobody wrote")]
)
def test_holds_a_launch_to_what_it_may_read_and_write(emulated, mode, message):
    data = torch.zeros(128)
    emulated.allow([region(data, mode)])
    with pytest.raises(RuntimeError, match=message):
        emulated.run_faulty("correct", data.data_ptr(), 128)


def test_the_padding_between_rows_is_out_of_bounds(emulated):
    padded = torch.zeros(8, 20)[:, :16]
    emulated.allow([region(padded)])
    with pytest.raises(RuntimeError, match="out of bounds"):
        emulated.run_faulty("correct", padded.data_ptr(), 128)


# Bytes that the floors of design.md allow, over what was moved.
SLACK = 1.05
M = 37


def tensors(d, dtype, d_teacher=None):
    torch.manual_seed(0)
    return torch.randn(M, d).to(dtype), torch.randn(M, d_teacher or d).to(dtype)


@pytest.fixture
def traffic(emulated):
    """Runs a launch and gives bytes of activations (loaded, stored), and of projectors loaded."""

    def measure(call):
        emulated.take_traffic()
        result = call()
        found = emulated.take_traffic()
        return result, *found["activations"], found.get("projectors", (0, 0))[0]

    return measure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [96, 97, 1536, 1037])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_identity_reads_and_writes_once(traffic, dtype, d, kind):
    student, teacher = tensors(d, dtype)
    row_bytes = M * d * student.element_size()
    (_, saved), loaded, stored, _ = traffic(
        lambda: CUDA.forward(LossCall(student, teacher, kind=kind))
    )
    assert loaded <= SLACK * 2 * row_bytes
    assert stored == 0
    for accumulate in (True, False):
        grad, call = torch.ones_like(student), GradCall(saved, student, teacher, kind=kind)
        _, loaded, stored, _ = traffic(
            lambda grad=grad, accumulate=accumulate, call=call: CUDA.backward_(
                call, grad, accumulate, torch.ones(())
            )
        )
        assert loaded <= SLACK * (3 if accumulate else 2) * row_bytes
        assert stored <= SLACK * row_bytes
    _, loaded, stored, _ = traffic(
        lambda: CUDA.forward(LossCall(student, teacher, kind=kind), grad=teacher)
    )
    assert loaded <= SLACK * 2 * row_bytes
    assert stored <= SLACK * row_bytes


@pytest.mark.parametrize("wide", ["wide, vectors", "wide, elements"])
def test_rows_too_wide_to_hold_are_read_once_a_use(traffic, wide):
    student, teacher = tensors(WIDTHS[wide], torch.float32)
    _, loaded, _, _ = traffic(lambda: CUDA.forward(LossCall(student, teacher)))
    assert loaded == 2 * 2 * student.numel() * 4


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("widths", [(512, 768), (53, 61)], ids=["vectors", "elements"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_projection_reads_wide_rows_once(traffic, dtype, widths, rank):
    (d_s, d_t), size = widths, dtype.itemsize
    student, teacher = tensors(d_s, dtype, d_t)
    proj, teacher_proj, mean = torch.randn(rank, d_s), torch.randn(rank, d_t), torch.randn(d_t)
    (_, saved), loaded, stored, of_proj = traffic(
        lambda: CUDA.forward(LossCall(student, teacher, proj, teacher_proj, mean))
    )
    assert loaded <= SLACK * M * (d_s + d_t) * size
    assert stored == 0
    tiles = -(-M // 8)  # the smallest block
    assert of_proj <= tiles * (rank * (d_s + d_t) + d_t) * 4
    grad = torch.ones_like(student)
    _, loaded, stored, of_proj = traffic(
        lambda: CUDA.backward_(GradCall(saved, student_proj=proj), grad, True, torch.ones(()))
    )
    assert loaded <= SLACK * M * d_s * size
    assert stored <= SLACK * M * d_s * size
    assert of_proj == -(-M // 4) * rank * d_s * 4  # so few rows have the smallest tiles


@pytest.mark.parametrize("rank", [0, 3])
def test_masked_rows_are_not_read(traffic, rank):
    student, teacher = tensors(96, torch.float32)
    weights = (torch.arange(M) % 2).float()
    proj = torch.randn(rank, 96) if rank else None
    call = LossCall(student, teacher, proj, proj, weights=weights)
    _, loaded, _, _ = traffic(lambda: CUDA.forward(call))
    assert loaded == 2 * (M // 2) * 96 * 4


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_masked_rows_take_no_upstream_gradient(emulated, rank, accumulate):
    student, teacher = tensors(96, torch.bfloat16)
    weights = (torch.arange(M) % 2).float()
    proj = torch.randn(rank, 96) if rank else None
    call = LossCall(student, teacher, proj, proj, weights=weights, reduction="none")
    _, saved = CUDA.forward(call)
    upstream = torch.where(weights == 0, torch.nan, 1.0)
    grad = torch.ones_like(student)
    wide = (None, None) if rank else (student, teacher)
    back = GradCall(saved, *wide, proj, weights=weights, reduction="none")
    CUDA.backward_(back, grad, accumulate, upstream)
    assert grad.isfinite().all()
    assert (grad[weights == 0] == accumulate).all()


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("d", [64, 1536])
def test_any_schedule_gives_the_same_bits(emulated, d, rank):
    torch.manual_seed(0)
    projectors = {}
    if rank:
        projectors = {"student_proj": torch.randn(rank, d), "teacher_proj": torch.randn(rank, d)}
    case = Case(torch.randn(50, d), torch.randn(50, d), weights=torch.rand(50), **projectors)
    results = []
    for seed in range(4):
        emulated.seed(seed)
        results.append(run(case, "cuda"))
    for other in results[1:]:
        for name, want in vars(results[0]).items():
            assert want is None or torch.equal(getattr(other, name), want), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_variant_matches_the_oracle(dtype, width, kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    student[1] = torch.nan
    student[2] = 0
    assert_no_worse_than_torch(Case(student, teacher, weights=weights, kind=kind), "cuda")
    assert_no_worse_than_torch(Case(student, teacher, weights=weights, kind=kind), "cuda", True)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_identical_pairs_give_exactly_zero_in_every_variant(width):
    student = torch.randn(2, width)
    result = run(Case(student, student.clone(), kind="cosine"), "cuda")
    assert result.loss == 0
    assert (result.grad_student == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [(1e25, 1e25), (1e25, 1e-3), (1.0, 1e30)])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_squares_that_overflow_are_summed_again_scaled(width, scales, kind):
    """One side or both; the loss of mse is itself infinite in float32 then."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, width), torch.randn(3, width)
    expected = run(Case(student, teacher, kind="cosine"), "cuda")
    big = run(Case(student * scales[0], teacher * scales[1], kind=kind), "cuda")
    assert torch.allclose(big.stats[0], expected.stats[0], rtol=1e-4, atol=1e-6)
    norms = expected.stats[1:3] * torch.tensor(scales)
    assert torch.allclose(big.stats[1:3], norms, rtol=1e-5)
    if kind == "cosine":
        assert torch.allclose(big.loss, expected.loss, rtol=1e-5)
    assert big.loss.isfinite() == (kind != "mse")


@pytest.mark.parametrize("inplace", [False, True])
def test_denominator_zero_leaves_statistics(inplace):
    student, teacher = tensors(1536, torch.float32)
    call = LossCall(student, teacher, denominator=torch.zeros(()))
    _, expected = CUDA.forward(LossCall(student, teacher))
    grad = teacher if inplace else None
    loss, saved = CUDA.forward(call, grad=grad)
    assert loss == 0
    assert torch.equal(saved[:4], expected[:4])
    assert not inplace or (teacher == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rank", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("widths", [(8, 16), (256, 264), (1000, 520)], ids=str)
def test_projection_in_vectors_matches_the_oracle(dtype, rank, widths):
    torch.manual_seed(0)
    d_s, d_t = widths
    weights = (torch.arange(70) % 3).float()
    student, teacher = torch.randn(70, d_s).to(dtype), torch.randn(80, d_t).to(dtype)
    teacher_rows = torch.randint(0, 79, (70,))
    student[weights == 0] = torch.nan  # neighbours in the products of tensor cores
    teacher[79] = torch.inf
    teacher_rows[weights == 0] = 79
    case = Case(
        student,
        teacher,
        torch.randn(rank, d_s) / d_s**0.5,
        torch.randn(rank, d_t) / d_t**0.5,
        torch.randn(d_t),
        teacher_rows=teacher_rows,
        weights=weights,
    )
    assert_no_worse_than_torch(case, "cuda")
    assert_no_worse_than_torch(case, "cuda", through_tap=True)


@pytest.mark.parametrize("rank", [8, 16])
def test_many_rows_are_projected_in_large_blocks(emulated, traffic, rank):
    torch.manual_seed(0)
    m, d = 9500, 16
    proj = torch.randn(rank, d)
    student, teacher = torch.randn(m, d), torch.randn(m, d)
    case = Case(student, teacher, proj, proj.clone(), torch.randn(d))
    assert_no_worse_than_torch(case, "cuda")
    call = LossCall(student, teacher, proj, case.teacher_proj, case.teacher_mean)
    (_, saved), _, _, of_proj = traffic(lambda: CUDA.forward(call))
    rows_per_block = 24 if rank == 8 else 16
    assert of_proj == -(-m // rows_per_block) * (2 * rank + 1) * d * 4
    # The size of a block changes no result.
    few = call._replace(student=student[:9], teacher=teacher[:9], reduction="none")
    few = CUDA.forward(few)[1]
    stats, few_stats = saved[5 : 5 + 3 * m].view(3, m), few[5 : 5 + 27].view(3, 9)
    assert torch.equal(few_stats, stats[:, :9])
    assert torch.equal(few[-9 * rank :], saved[-m * rank :][: 9 * rank])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_reduced_in_parts(reduction, weighted):
    m = 9001
    assert CUDA.machine.kernels.cuda_scratch(m, 1, 0, 4, 0, 0) > 0
    torch.manual_seed(0)
    weights = torch.rand(m) if weighted else None
    case = Case(torch.randn(m, 4), torch.randn(m, 4), weights=weights, reduction=reduction)
    assert_no_worse_than_torch(case, "cuda")


@pytest.mark.parametrize(
    ("layers", "m", "launches"), [(3, 40, 2), (3, 1100, 2), (28, 3, 2), (35, 3, 4)]
)
@pytest.mark.parametrize("rank", [0, 8])
def test_layers_share_launches(emulated, rank, layers, m, launches):
    """Losses, statistics and gradients bit for bit those of layer after layer."""
    torch.manual_seed(0)
    d = 24
    students = [torch.randn(m, d) for _ in range(layers)]
    teachers = [torch.randn(m, d) for _ in range(layers)]
    projs = [torch.randn(rank, d) if rank else None for _ in range(layers)]
    weights, upstream = torch.rand(m), torch.rand(layers)
    calls = [
        LossCall(s, t, p, p, weights=weights)
        for s, t, p in zip(students, teachers, projs, strict=True)
    ]
    before = emulated.launches()
    losses, saved = CUDA.forward_layers(calls)
    grads = [torch.empty(m, d) for _ in range(layers)]
    between = emulated.launches()
    backs = [back_of(call, one) for call, one in zip(calls, saved, strict=True)]
    CUDA.backward_layers_(backs, grads, upstream)
    assert between - before == launches
    assert emulated.launches() - between == -(-layers // 32)
    for i, call in enumerate(calls):
        loss, own = CUDA.forward(call)
        assert torch.equal(losses[i], loss)
        assert torch.equal(saved[i], own)
        grad = torch.empty(m, d)
        CUDA.backward_(back_of(call, own), grad, False, upstream[i])
        assert torch.equal(grads[i], grad)


def back_of(call, saved):
    """What the gradient of ``call`` needs."""
    wide = (None, None) if call.rank else (call.student, call.teacher)
    return GradCall(saved, *wide, call.student_proj, weights=call.weights)


def test_layers_that_need_different_kernels(emulated):
    torch.manual_seed(0)
    widths = (24, 25, 25, 1032, 24)
    students = [torch.randn(5, d) for d in widths]
    teachers = [torch.randn(5, d) for d in widths]
    calls = [LossCall(s, t) for s, t in zip(students, teachers, strict=True)]
    losses, saved = CUDA.forward_layers(calls)
    grads = [torch.empty_like(x) for x in students]
    backs = [back_of(call, one) for call, one in zip(calls, saved, strict=True)]
    CUDA.backward_layers_(backs, grads, torch.ones(5))
    for student, teacher, loss, grad in zip(students, teachers, losses, grads, strict=True):
        alone = run(Case(student, teacher), "cuda")
        assert torch.equal(loss * 0.5, alone.loss * 0.5)
        assert torch.equal(grad * 0.5, alone.grad_student)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
def test_vectors_at_offsets_past_2_31_elements(dims, dtype, rank):
    """As in test_rep_loss, for the vector variants; in 3-D with a gap between batches."""
    torch.manual_seed(0)
    d, n = 1024, 2**20 + 7
    big = torch.empty(2 * n, d, dtype=dtype)
    if dims == 3:
        big = torch.empty(3, n + 1, d, dtype=dtype)[:, :n]
    rows = torch.tensor([big.shape[:-1].numel() - 1, big.shape[:-1].numel() - 4])
    at = (-1, [-1, -4]) if dims == 3 else ([-1, -4],)
    big[at] = torch.randn(2, d).to(dtype)
    small, teacher = big[at], torch.randn(2, d).to(dtype)
    proj = torch.randn(rank, d) if rank else None
    teacher_proj = torch.randn(rank, d) if rank else None

    def forward(student, teacher, rows, teacher_rows):
        projectors = (proj, teacher_proj, None)
        return CUDA.forward(LossCall(student, teacher, *projectors, rows, teacher_rows))

    def backward(student, rows, saved):
        grad = torch.empty_strided(student.shape, student.stride(), dtype=dtype)
        wide = (None, None) if rank else (student, teacher)
        CUDA.backward_(GradCall(saved, *wide, proj, rows), grad, False, torch.ones(()))
        return grad

    loss, saved = forward(big, teacher, rows, None)
    expected, small_saved = forward(small, teacher, None, None)
    assert torch.equal(loss, expected)
    assert torch.equal(backward(big, rows, saved)[at], backward(small, None, small_saved))
    as_teacher, _ = forward(teacher, big, None, rows)
    assert torch.equal(as_teacher, forward(teacher, small, None, None)[0])


def test_a_gradient_with_a_strided_last_dimension_is_served_by_a_copy():
    student, teacher = tensors(24, torch.float32)
    _, saved = CUDA.forward(LossCall(student, teacher))
    call = GradCall(saved, student, teacher)
    strided = torch.ones(24, M).T
    dense = torch.ones(M, 24)
    for grad in (strided, dense):
        CUDA.backward_(call, grad, True, torch.ones(()))
    assert torch.equal(strided, dense)
