"""The rule every backend is held to.

Its error against the float64 reference may be at most twice that of PyTorch, which upcasts the
same inputs to float32, computes there and rounds its outputs to their dtype. For 16-bit states it
may also be an eighth of what rounding them to their dtype has changed already (`Case.unrounded`).
Where PyTorch is exact by luck (a single row, a width of 1), what is allowed is what float32 cannot
do without: two roundings of the largest value, what the exact result itself changes by if every
input is rounded once, and what rounding the unit vectors leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from oprd_kernels import BackendUnavailable, fused_rep_loss, rep_tap
from oprd_kernels.backends.reference import unit

TENSORS = ("student", "teacher", "student_proj", "teacher_proj", "teacher_mean")
EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """A call of `fused_rep_loss` and the gradient that arrives at its loss."""

    student: Tensor
    teacher: Tensor
    student_proj: Tensor | None = None
    teacher_proj: Tensor | None = None
    teacher_mean: Tensor | None = None
    rows: Tensor | None = None
    teacher_rows: Tensor | None = None
    weights: Tensor | None = None
    kind: str = "nmse"
    reduction: str = "mean"
    denominator: float | None = None

    def in_float64(self) -> Case:
        """The same values, exactly, in double."""
        tensors = {n: getattr(self, n) for n in TENSORS}
        return replace(self, **{n: x.double() for n, x in tensors.items() if x is not None})

    def rounded_once(self) -> Case:
        """In float64, every value off by up to half a unit in float32's last place."""
        exact = self.in_float64()
        generator = torch.Generator().manual_seed(0)

        def perturb(x: Tensor) -> Tensor:
            noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
            return x * (1 + EPS32 / 2 * noise)

        tensors = {n: getattr(exact, n) for n in TENSORS}
        return replace(exact, **{n: perturb(x) for n, x in tensors.items() if x is not None})

    def unrounded(self, seed: int) -> Case:
        """In float64, states that round to this case's: every 16-bit value is off by up to half a
        unit in the last place."""
        exact = self.in_float64()
        generator = torch.Generator().manual_seed(seed)
        states = {}
        for name in ("student", "teacher"):
            rounded, x = getattr(self, name), getattr(exact, name)
            if rounded.dtype in (torch.bfloat16, torch.float16):
                info = torch.finfo(rounded.dtype)
                _, exponent = torch.frexp(x.abs().clamp(min=info.smallest_normal))
                unit = torch.ldexp(torch.full_like(x, info.eps), exponent - 1)
                noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
                states[name] = x + unit * noise
        return replace(exact, **states)

    def kwargs(self) -> dict:
        skip = ("student", "teacher", "student_proj")
        return {k: v for k, v in vars(self).items() if k not in skip}


@dataclass(frozen=True)
class Result:
    """Loss, batch statistics and gradients of one run."""

    loss: Tensor
    stats: Tensor
    grad_student: Tensor
    grad_proj: Tensor | None


def run(case: Case, backend: str, through_tap: bool = False, device: str = "cpu") -> Result:
    """Forward and backward on ``device``; through the tap, with a second use of the states behind
    it. The result is on the CPU."""
    tensors = {n: x for n, x in vars(case).items() if isinstance(x, Tensor)}
    case = replace(case, **{n: x.to(device) for n, x in tensors.items()})
    # detach() keeps the strides, which clone() would tidy up.
    student = case.student.detach().requires_grad_()
    proj = None if case.student_proj is None else case.student_proj.detach().requires_grad_()
    kwargs = case.kwargs() | {"student_proj": proj, "backend": backend}
    if through_tap:
        h, loss, stats = rep_tap(student, case.teacher, return_stats=True, **kwargs)
    else:
        loss, stats = fused_rep_loss(student, case.teacher, return_stats=True, **kwargs)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=device)[: loss.numel()]
    total = (loss * upstream.reshape(loss.shape)).sum()
    if through_tap:
        total = total + (h * downstream_grad(h)).sum()
    total.backward()
    return Result(
        loss.detach().cpu(),
        torch.stack(list(stats)).cpu(),
        student.grad.cpu(),
        None if proj is None else proj.grad.cpu(),
    )


def downstream_grad(h: Tensor) -> Tensor:
    """A fixed gradient for what lies behind a tap."""
    values = torch.linspace(-1, 1, h.numel(), dtype=torch.float32, device=h.device)
    return values.reshape(h.shape).to(h.dtype)


def is_for_another_backend(case: Case, backend: str) -> bool:
    """Whether this is one of the calls that the CUDA C++ kernels leave to Triton."""
    if backend != "cuda":
        return False
    pair = (case.student, case.teacher)
    return (
        case.student.dtype != case.teacher.dtype
        or any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in pair)
        or (case.student_proj is not None and case.student_proj.shape[0] > 16)
    )


def assert_no_worse_than_torch(
    case: Case, backend: str, through_tap: bool = False, device: str = "cpu"
) -> None:
    """Holds ``backend`` on ``device`` to the rule above: loss, statistics and every gradient."""
    if is_for_another_backend(case, backend):
        with pytest.raises(BackendUnavailable, match=f"backend={backend!r} can't run: .*: it "):
            run(case, backend, through_tap, device)
        return
    exact = run(case.in_float64(), "reference", through_tap)
    torch32 = run(case, "reference", through_tap)
    rounded = run(case.rounded_once(), "reference", through_tap)
    has_halves = any(x.dtype.itemsize == 2 for x in (case.student, case.teacher))
    seeds = range(3) if has_halves else ()
    unrounded = [run(case.unrounded(seed), "reference", through_tap) for seed in seeds]
    ours = run(case, backend, through_tap, device)
    floors = unit_vector_floors(case)
    for name in vars(exact):
        want, got = getattr(exact, name), getattr(ours, name)
        if want is None:
            assert got is None, name
            continue
        assert got.dtype == getattr(torch32, name).dtype, name
        assert got.shape == want.shape, name
        if not want.numel():
            continue
        want = want.double()
        finite = want.isfinite()
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN where there should be none"
        scale = want[finite].abs().max() if finite.any() else torch.zeros(())
        ours_error = _error(got, want)
        torch_error = _error(getattr(torch32, name), want)
        limit = 2 * torch_error + 2 * EPS32 * scale
        changes = [_error(getattr(one, name), want) for one in unrounded]
        limit = max([limit, *(change / 8 for change in changes)])
        limit += _error(getattr(rounded, name), want) + floors[name]
        limit += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        assert ours_error <= limit, (
            f"{name}: error {ours_error:.3e}, allowed {limit:.3e}, PyTorch's {torch_error:.3e}, "
            f"largest {scale:.3e}"
        )


def unit_vector_floors(case: Case) -> dict[str, float]:
    """What rounding the unit vectors alone may do to each result, in float32.

    A gradient is the difference e of two unit vectors over |z_S|: half a unit in the last place
    of a unit vector's element leaves an error of EPS32 times that element in it.
    """
    exact = case.in_float64()
    z_s, z_t = exact.student.flatten(0, -2), exact.teacher.flatten(0, -2)
    z_s = z_s if case.rows is None else z_s[case.rows]
    z_t = z_t if case.teacher_rows is None else z_t[case.teacher_rows]
    h_max = z_s.nan_to_num(0, 0, 0).abs().amax() if z_s.numel() else 0.0
    proj_max = 1.0
    if exact.student_proj is not None:
        proj_max = exact.student_proj.abs().max()
        z_s = z_s @ exact.student_proj.T
        z_t = z_t if case.teacher_mean is None else z_t - exact.teacher_mean
        z_t = z_t if case.teacher_proj is None else z_t @ exact.teacher_proj.T
    # In one or two dimensions PyTorch's unit vectors are often exact, as (1) always is.
    element = 1.0 if z_s.shape[-1] <= 2 else EPS32
    difference = (unit(z_s) - unit(z_t)).norm(dim=-1)
    # 3: nmse's factor 2 / D at D = 1 times the largest upstream gradient of `run`.
    per_row = 3 * EPS32 * (difference + element) / z_s.norm(dim=-1)
    per_row = per_row[per_row.isfinite()]
    return {
        "loss": EPS32**2 * len(z_s),
        "stats": EPS32**2,
        "grad_student": float(per_row.max() * proj_max) if per_row.numel() else 0.0,
        "grad_proj": float(per_row.sum() * h_max),
    }


def _error(got: Tensor, want: Tensor) -> Tensor:
    error = (got.double() - want).abs()
    error[got.double() == want] = 0  # equal infinities
    return error.nan_to_num(nan=0.0, posinf=torch.inf).max()
