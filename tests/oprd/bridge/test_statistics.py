"""Streamed statistics and what is solved from them, against dense float64 algebra."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.bridge.heldout import Agreement, ranks_up_to
from oprd.bridge.project import project_rows
from oprd.bridge.sgd import KeptRows, SgdConfig, sgd
from oprd.bridge.solve import random_student_proj, residual_variances, ridge, teacher_basis
from oprd.bridge.statistics import CHUNK, PairStatistics
from oprd.errors import ConfigError
from oprd.observability.memory import PeakMemory

D_S, D_T, N = 12, 16, 400


def make_states(rows=N, seed=0, offset=3.0):
    """(rows, D_S) and (rows, D_T) float64 that share part of their variation and have means."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.Generator().manual_seed(99)
    shared = normal(rows, 6)
    to_s = torch.randn(6, D_S, generator=mixing, dtype=torch.float64)
    to_t = torch.randn(6, D_T, generator=mixing, dtype=torch.float64)
    scales = torch.linspace(2.0, 0.2, D_T, dtype=torch.float64)
    student = shared @ to_s + 0.3 * normal(rows, D_S) + offset
    teacher = shared @ to_t + scales * normal(rows, D_T) - 2 * offset
    return student, teacher


def statistics_of(student, teacher, batch=100, **options):
    found = PairStatistics.empty(student.shape[1], teacher.shape[1])
    for s, t in zip(student.split(batch), teacher.split(batch), strict=True):
        found.update(s, t, **options)
    return found


FIELDS = ("student_mean", "teacher_mean", "student_scatter", "teacher_scatter", "cross_scatter")


def assert_equal_statistics(a, b, rtol=1e-11):
    assert a.count == b.count
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert torch.allclose(x, y, rtol=rtol, atol=rtol * y.abs().max().item()), name


def assert_dense(found, student, teacher, rtol):
    centred = teacher - teacher.mean(0)
    for actual, wanted in (
        (found.teacher_mean, teacher.mean(0)),
        (found.teacher_scatter, centred.T @ centred),
        (found.student_gram, student.T @ student),
        (found.cross, student.T @ centred),
    ):
        assert (actual - wanted).abs().max() <= rtol * wanted.abs().max()


def test_streamed_moments_are_the_dense_ones():
    student, teacher = make_states()
    assert_dense(statistics_of(student, teacher), student, teacher, 1e-12)


@pytest.mark.parametrize(
    ("products", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_large_means_do_not_cancel(products, rtol):
    """Means of 1e6 beside deviations of 1: float32 sums of squares would lose everything."""
    student, teacher = make_states(rows=3 * CHUNK + 7, offset=1e6)
    found = statistics_of(student, teacher, batch=5000, products=products)
    s, t = student - student.mean(0), teacher - teacher.mean(0)
    for actual, wanted in (
        (found.student_scatter, s.T @ s),
        (found.teacher_scatter, t.T @ t),
        (found.cross_scatter, s.T @ t),
    ):
        assert (actual - wanted).abs().max() <= rtol * wanted.abs().max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, N - 1), max_size=6))
def test_order_and_splits_change_nothing(seed, cuts):
    student, teacher = make_states()
    whole = statistics_of(student, teacher, batch=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    bounds = [0, *sorted(set(cuts)), N]
    parts = [statistics_of(student[order[a:b]], teacher[order[a:b]]) for a, b in pairwise(bounds)]
    merged = PairStatistics.empty(D_S, D_T)
    for part in parts:
        merged.merge(part)
    assert_equal_statistics(merged, whole)
    merged.merge(PairStatistics.empty(D_S, D_T))
    assert_equal_statistics(merged, whole)


def test_rows_not_picked_never_enter():
    student, teacher = make_states(rows=60)
    rows = torch.arange(5, 60, 2)
    wanted = statistics_of(student[rows], teacher[rows])
    poisoned = torch.full_like(student, torch.nan)
    poisoned[rows] = student[rows]
    found = PairStatistics.empty(D_S, D_T)
    found.update(poisoned, teacher[rows], rows)
    assert_equal_statistics(found, wanted)


def test_rows_that_do_not_fit_are_refused():
    found = PairStatistics.empty(D_S, D_T)
    with pytest.raises(ValueError, match=r"12 wide and a teacher \(5, 16\)"):
        found.update(torch.zeros(5, D_S), torch.zeros(4, D_T))
    with pytest.raises(ValueError, match="12 wide"):
        found.update(torch.zeros(5, D_S + 1), torch.zeros(5, D_T))


def test_a_million_rows_need_no_more_memory_than_a_few():
    generator = torch.Generator().manual_seed(0)
    found = PairStatistics.empty(32, 40)
    batch = 20_000

    def add(batches):
        for _ in range(batches):
            student = torch.randn(batch, 32, generator=generator) + 100
            teacher = torch.nn.functional.pad(student, (0, 8), value=1.0)
            found.update(student, teacher)

    add(2)
    with PeakMemory(torch.device("cpu")) as few:
        add(2)
    with PeakMemory(torch.device("cpu")) as many:
        add(46)
    assert found.count == 1_000_000
    # One more copy of the rows would be 46 * 20,000 * 72 * 4 bytes = 265 MB.
    if few.peak is not None and many.peak is not None:
        assert many.peak - few.peak < 20e6
    variances = found.student_scatter.diagonal() / found.count
    assert (variances - 1).abs().max() < 0.01
    assert torch.allclose(found.cross_scatter[:, :32], found.student_scatter, rtol=1e-10, atol=1e-5)
    assert found.teacher_scatter[32:, 32:].abs().max() < 1e-12


def _worker(rank, ranks, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=ranks)
    student, teacher = make_states()
    bounds = [0, 130, N, N]  # the third rank has nothing
    mine = slice(bounds[rank], bounds[rank + 1])
    found = (
        statistics_of(student[mine], teacher[mine])
        if rank < 2
        else (PairStatistics.empty(D_S, D_T))
    )
    found.reduce_over_ranks()
    torch.save({n: getattr(found, n) for n in ("count", *FIELDS)}, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_together_have_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_worker, args=(3, str(tmp_path)), nprocs=3)
    whole = statistics_of(*make_states())
    for rank in range(3):
        found = PairStatistics(**torch.load(tmp_path / f"{rank}.pt"))
        assert_equal_statistics(found, whole)
    alone = copy.deepcopy(whole)
    alone.reduce_over_ranks()
    assert_equal_statistics(alone, whole)


# Solving -----------------------------------------------------------------------------------------


def test_the_basis_is_the_dense_pca():
    student, teacher = make_states()
    basis = teacher_basis(statistics_of(student, teacher), 5)
    centred = teacher - teacher.mean(0)
    _, singular, vt = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(basis.variances, singular**2 / N, rtol=1e-10)
    assert torch.allclose((basis.directions * vt[:5]).sum(1).abs(), torch.ones(5).double())
    assert (basis.directions.gather(1, basis.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_pca_leaves_the_discarded_eigenvalues_and_no_basis_leaves_less():
    """Theory (4)."""
    student, teacher = make_states()
    found = statistics_of(student, teacher)
    centred = teacher - teacher.mean(0)
    for rank in (1, 4, 9):
        basis = teacher_basis(found, rank)

        def residual(directions):
            return (centred - centred @ directions.T @ directions).square().sum(1).mean().item()

        left = residual(basis.directions)
        assert left == pytest.approx(basis.variances[rank:].sum().item(), rel=1e-10)
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            other = torch.randn(D_T, rank, generator=generator, dtype=torch.float64)
            assert left <= residual(torch.linalg.qr(other).Q.T) + 1e-12


def test_ridge_without_penalty_is_least_squares():
    student, teacher = make_states()
    found = statistics_of(student, teacher)
    basis = teacher_basis(found, 6)
    target = (teacher - teacher.mean(0)) @ basis.directions.T
    wanted = torch.linalg.lstsq(student, target).solution.T
    actual = ridge(found, basis.directions, 0.0)
    assert (actual - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_ridge_with_penalty_is_least_squares_with_more_rows():
    """The penalty is N * strength * mean square, as d extra rows of the data would give it."""
    student, teacher = make_states()
    found = statistics_of(student, teacher)
    basis = teacher_basis(found, 6)
    target = (teacher - teacher.mean(0)) @ basis.directions.T
    penalty = 0.01 * student.square().sum() / D_S
    rows = torch.cat([student, penalty.sqrt() * torch.eye(D_S, dtype=torch.float64)])
    targets = torch.cat([target, torch.zeros(D_S, 6, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, targets).solution.T
    actual = ridge(found, basis.directions, 0.01)
    assert (actual - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_what_the_bridge_leaves_on_the_rows_it_was_fitted_to():
    """Theory (5): sum of lambda_i (1 - rho_i^2), never less at a higher rank."""
    student, teacher = make_states()
    found = statistics_of(student, teacher)
    basis = teacher_basis(found, 10)
    proj = ridge(found, basis.directions, 1e-14)
    target = (teacher - teacher.mean(0)) @ basis.directions.T
    dense = (student @ proj.T - target).square().mean(0)
    fitted = student @ torch.linalg.lstsq(student, target).solution
    rho2 = 1 - (target - fitted).square().sum(0) / target.square().sum(0)
    wanted = basis.variances[:10] * (1 - rho2)
    assert torch.allclose(dense, wanted, rtol=1e-6)
    left = residual_variances(found, proj, basis.directions)
    assert torch.allclose(left, wanted, rtol=1e-6)
    sums = left.cumsum(0)
    assert (sums.diff() >= 0).all()


def test_a_lower_rank_is_a_slice():
    found = statistics_of(*make_states())
    high, low = teacher_basis(found, 8), teacher_basis(found, 3)
    assert torch.equal(high.directions[:3], low.directions)
    assert torch.allclose(
        ridge(found, high.directions, 1e-6)[:3], ridge(found, low.directions, 1e-6), rtol=1e-12
    )
    assert torch.equal(random_student_proj(8, D_S, 0)[:3], random_student_proj(3, D_S, 0))


def test_sgd_reaches_the_objective_of_ridge():
    student, teacher = make_states(rows=2000)
    found = statistics_of(student, teacher)
    basis = teacher_basis(found, 4)
    target = ((teacher - teacher.mean(0)) @ basis.directions.T).float()
    best = residual_variances(found, ridge(found, basis.directions, 1e-12), basis.directions)
    rows = student.float()
    cfg = SgdConfig(epochs=300, lr=1e-2, batch_rows=500)
    learnt = sgd(rows[200:], target[200:], rows[:200], target[:200], cfg, seed=0)
    reached = residual_variances(found, learnt, basis.directions)
    assert (reached >= best - 1e-9).all()
    assert reached.sum() <= 1.02 * best.sum()
    start = residual_variances(found, random_student_proj(4, D_S, 0), basis.directions)
    assert start.sum() > 2 * best.sum()


def test_sgd_keeps_the_epoch_with_the_best_held_out_cosine():
    """Held-out targets that the fit moves away from: the first epoch is the best."""
    student, teacher = make_states(rows=300)
    rows, target = student.float(), (teacher[:, :3] - teacher[:, :3].mean(0)).float()
    args = (rows, target, rows, -target)
    one, many = (sgd(*args, SgdConfig(epochs=n, batch_rows=300), seed=0) for n in (1, 20))
    assert torch.equal(one, many)


def test_sgd_that_diverges_is_an_error():
    h, z = torch.full((4, 2), torch.nan), torch.ones(4, 1)
    with pytest.raises(ConfigError, match=r"every one of 3 epochs: lower sgd\.lr"):
        sgd(h, z, h, z, SgdConfig(epochs=3), seed=0)


def test_kept_rows_are_one_sample_for_all_layers():
    kept = KeptRows([0, 1], total=100, max_rows=30, seed=0)
    numbers = torch.arange(100.0)[:, None]
    for block, size in ((0, 7), (1, 13)):
        for part in numbers.split(size):
            picked = kept.pick(block, len(part))
            kept.keep(block, part[picked], -part[picked])
    first, second = kept.of(0), kept.of(1)
    assert len(first[0].unique()) == 30
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], -first[0])


def test_too_few_rows_singular_and_non_finite_states_are_errors():
    student, teacher = make_states(rows=8)
    few = statistics_of(student, teacher)
    with pytest.raises(ConfigError, match="8 rows cannot give 8 principal directions: lower rank"):
        teacher_basis(few, 8)
    flat = student.clone()
    flat[:, 1] = 0
    singular = statistics_of(flat, teacher)
    directions = teacher_basis(singular, 2).directions
    with pytest.raises(ConfigError, match=r"do not span its 12 dimensions.*ridge=0\.0"):
        ridge(singular, directions, 0.0)
    assert ridge(singular, directions, 1e-6).isfinite().all()
    teacher[3, 3] = torch.inf
    with pytest.raises(ConfigError, match="teacher has hidden states that are not finite"):
        teacher_basis(statistics_of(student, teacher), 2)
    student[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="student has hidden states that are not finite"):
        ridge(statistics_of(student, teacher), directions, 1e-6)


# Held-out rows -----------------------------------------------------------------------------------


def test_one_pass_gives_the_cosine_at_every_rank():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5000, 11, generator=generator) for _ in range(2))
    student += 0.5 * teacher
    agreement = Agreement(ranks_up_to(11))
    for s, t in zip(student.split(4500), teacher.split(4500), strict=True):
        agreement.update(s, t)
    assert agreement.ranks == [1, 2, 4, 8, 11]
    assert agreement.total_rows(torch.device("cpu")) == 5000
    for rank, mean in zip(
        agreement.ranks, agreement.mean_cosines(torch.device("cpu")), strict=True
    ):
        wanted = torch.cosine_similarity(student[:, :rank], teacher[:, :rank]).mean().item()
        assert mean == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_projected_in_float32_even_under_autocast(dtype):
    _, teacher = make_states(rows=CHUNK + 50)
    states = teacher.to(dtype)
    rows = torch.arange(CHUNK + 20).flip(0)
    proj, mean = torch.randn(4, D_T), teacher.mean(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = project_rows(states, rows, proj, mean)
    wanted = (states[rows].double() - mean) @ proj.double().T
    assert z.dtype == torch.float32
    assert (z - wanted).abs().max() <= 1e-5 * wanted.abs().max()
