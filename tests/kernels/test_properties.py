"""Random calls, shapes and values against the float64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.oracle import Case, assert_no_worse_than_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(draw, shape, dtype, generator):
    """Rows of the regimes that break naive kernels."""
    x = torch.randn(shape, generator=generator)
    regimes = ["normal", "large", "huge", "small", "tiny", "offset", "some zero rows"]
    regime = draw(st.sampled_from(regimes))
    if regime == "large" or (regime == "huge" and dtype == torch.float16):
        x = x * 3e3  # within float16
    elif regime == "huge":
        x = x * 1e17  # squares within float32
    elif regime == "small":
        x = x * 1e-6
    elif regime == "tiny":
        x = x * 1e-10
    elif regime == "offset":
        x = x + 100
    elif regime == "some zero rows" and x.shape[0]:
        x[:: draw(st.integers(1, 3))] = 0
    return x.to(dtype)


def laid_out(draw, x):
    """The same values in another memory layout."""
    layout = draw(st.sampled_from(["contiguous", "padded", "column major", "every second", "3-D"]))
    n, d = x.shape
    if layout == "padded":
        return torch.cat([x, x], dim=1)[:, :d] if d else x
    if layout == "column major":
        return x.T.contiguous().T
    if layout == "every second":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "3-D" and n % 2 == 0:
        return x.reshape(2, n // 2, d)
    return x


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.sampled_from([0, 0, 1, 2, 3, 4, 8, 17, 40]))
    dtype, teacher_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    n, d_s = draw(st.integers(0, 13)), draw(st.integers(1, 70))
    d_t = draw(st.integers(1, 70)) if rank else d_s
    kwargs = {
        "kind": draw(st.sampled_from(["mse", "nmse", "cosine"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "upstream": 10.0 ** draw(st.integers(-12, 12)),
    }
    student = values(draw, (n, d_s), dtype, generator)
    m = n
    if draw(st.booleans()):
        m = draw(st.integers(0, n))
        kwargs["rows"] = torch.randperm(n, generator=generator)[:m]
    if draw(st.booleans()) and (n or not m):
        n_t = n + draw(st.integers(0, 3))
        kwargs["teacher_rows"] = torch.randint(0, max(n_t, 1), (m,), generator=generator)
    else:
        n_t = m
    teacher = values(draw, (n_t, d_t), teacher_dtype, generator)
    if not rank and n_t == n and "rows" not in kwargs and draw(st.booleans()):
        close = 1 + 1e-3 * torch.randn(n, d_s, generator=generator)
        teacher = (student.float() * close).to(teacher_dtype)
    if rank:
        kwargs["student_proj"] = torch.randn(rank, d_s, generator=generator)
        kwargs["teacher_proj"] = torch.randn(rank, d_t, generator=generator)
        # The mean of one row is the row. Projected apart, as where states are 16-bit, they leave a
        # rounding error, whose direction means nothing.
        has_mean = n_t > 1 or (n_t == 1 and teacher_dtype == torch.float32)
        if draw(st.booleans()):
            kwargs["teacher_mean"] = teacher.float().mean(0) if has_mean else torch.zeros(d_t)
    student, teacher = laid_out(draw, student), laid_out(draw, teacher)
    if draw(st.booleans()):
        weights = torch.rand(m, generator=generator)
        weights[torch.rand(m, generator=generator) < 0.3] = 0
        kwargs["weights"] = weights
        masked = weights == 0
        if masked.any() and "teacher_rows" not in kwargs:
            teacher.flatten(0, -2)[masked] = draw(st.sampled_from([torch.nan, torch.inf, 0.0]))
    return Case(student, teacher, **kwargs)


def test_any_call_is_no_worse_than_torch(backend):
    """Calls are the same whenever the same modules are loaded: Hypothesis also tries the constants
    that it sees in them."""

    @settings(
        max_examples=30 if backend == "triton" else 300,  # interpreted, a call takes a second
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(case=cases(), through_tap=st.booleans())
    def holds(case, through_tap):
        assert_no_worse_than_torch(case, backend, through_tap)

    holds()


@pytest.mark.parametrize("kind", ["nmse", "cosine"])
@pytest.mark.parametrize("through_tap", [False, True])
@pytest.mark.parametrize(
    ("scales", "upstream"),
    [((1e16, 1e16), 1e-6), ((1e18, 1e18), 1e-6), ((1e18, 1e-11), 1e-12), ((1e-11, 1e-11), 1e12),
     ((1e-11, 1e18), 1e12)],
)  # fmt: skip
def test_gradients_far_from_1_over_norms_squared(backend, scales, upstream, kind, through_tap):
    """upstream / |s|^2 leaves float32's range, the gradient does not."""
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 60), torch.randn(5, 60)
    teacher[0] = student[0] * 1.001
    case = Case(student * scales[0], teacher * scales[1], kind=kind, upstream=upstream)
    assert_no_worse_than_torch(case, backend, through_tap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_have_the_direction_of_their_projector(backend, dtype):
    """One element each, which Hypothesis found: rounding them to 16 bits cannot change the cosine,
    and rounding P to two terms of 16-bit numbers can."""
    generator = torch.Generator().manual_seed(73)
    student = torch.randn(1, 1, generator=generator)
    teacher = (torch.randn(1, 1, generator=generator) * 1e-6).bfloat16()
    for _ in range(2):
        projectors = [torch.randn(2, 1, generator=generator) for _ in range(2)]
        for states in ((student, teacher), (student.to(dtype), teacher.to(dtype))):
            projected = Case(*states, *projectors, kind="mse")
            assert_no_worse_than_torch(projected, backend)
