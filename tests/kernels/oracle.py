"""The rule every backend is held to.

Its error against the float64 reference may be at most twice that of PyTorch, which upcasts the
same inputs to float32, computes there and rounds its outputs to their dtype. For 16-bit states it
may also be an eighth of what rounding them to their dtype has changed already (`Case.unrounded`).
GPU backends multiply 16-bit states by projectors of 16 bits or more, so their error may also be
what changing the projectors' elements by 2^-17 changes (`Case.projected_in_terms`). That is less
than the eighth, except where a row is so narrow, or one element of it so large, that rounding the
states leaves the direction of P h as it is.
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
from oprd_kernels.backends.reference import EPS, unit

TENSORS = ("student", "teacher", "student_proj", "teacher_proj", "teacher_mean")
STATS = ("cosine", "student_norm", "teacher_norm", "num_valid")
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
    upstream: float = 1.0  # the size of the gradient that arrives at the loss

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

    def projected_in_terms(self, seed: int) -> Case:
        """In float64, with the projectors of 16-bit states off by 2^-17 of every element."""
        exact = self.in_float64()
        generator = torch.Generator().manual_seed(seed)
        projs = {}
        for name in ("student", "teacher"):
            proj = getattr(exact, f"{name}_proj")
            if proj is not None and getattr(self, name).dtype.itemsize == 2:
                sign = 2 * torch.randint(2, proj.shape, generator=generator).double() - 1
                projs[f"{name}_proj"] = proj * (1 + 2**-17 * sign)
        return replace(exact, **projs)

    def kwargs(self) -> dict:
        skip = ("student", "teacher", "student_proj", "upstream")
        return {k: v for k, v in vars(self).items() if k not in skip}


@dataclass(frozen=True)
class Result:
    """Loss, batch statistics and gradients of one run."""

    loss: Tensor
    stats: Tensor
    grad_student: Tensor
    grad_proj: Tensor | None

    def parts(self) -> dict[str, Tensor | None]:
        """The results that are held to the rule each by itself."""
        stats = dict(zip(STATS, self.stats, strict=True))
        grads = {"grad_student": self.grad_student, "grad_proj": self.grad_proj}
        return {"loss": self.loss, **stats, **grads}


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
    upstream = upstream * case.upstream
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
    in_terms = []
    if has_halves and case.student_proj is not None and backend != "cpu":
        terms = [case.projected_in_terms(seed) for seed in range(8)]
        in_terms = [run(one, "reference", through_tap) for one in terms]
    ours = run(case, backend, through_tap, device)
    floors = floors_of(case)
    torch32, rounded, ours = torch32.parts(), rounded.parts(), ours.parts()
    unrounded, in_terms = ([one.parts() for one in some] for some in (unrounded, in_terms))
    for name, want in exact.parts().items():
        got, by_torch = ours[name], torch32[name]
        if want is None:
            assert got is None, name
            continue
        assert got.dtype == by_torch.dtype, name
        assert got.shape == want.shape, name
        if not want.numel():
            continue
        want = want.double()
        finite = want.isfinite()
        # Where float32 itself overflows, infinities may meet.
        wrong = (got.isnan() != want.isnan()) & (by_torch.isfinite() | want.isnan())
        assert not wrong.any(), f"{name}: NaN where there should be none, or none where it should"
        scale = want[finite].abs().max() if finite.any() else torch.zeros(())
        ours_error = _error(got, want)
        torch_error = _error(by_torch, want)
        limit = 2 * torch_error + 2 * EPS32 * scale
        changes = [_error(one[name], want) / 8 for one in unrounded]
        changes += [_error(one[name], want) for one in in_terms]
        limit = max([limit, *changes])
        limit += _error(rounded[name], want) + floors.get(name, 0.0)
        limit += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        if limit >= torch.finfo(got.dtype).max:
            continue  # any value is near enough, an infinity too
        assert ours_error <= limit, (
            f"{name}: error {ours_error:.3e}, allowed {limit:.3e}, PyTorch's {torch_error:.3e}, "
            f"largest {scale:.3e}"
        )


def floors_of(case: Case) -> dict[str, float]:
    """What rounding the unit vectors alone may do to each result, in float32.

    A gradient is the difference e of two unit vectors over |z_S|: half a unit in the last place
    of a unit vector's element leaves an error of EPS32 times that element in it. In the loss,
    |e|^2 / 2, such errors are multiplied by e's elements and add up as random ones do: three
    standard deviations of them. A cosine is 1 minus a number up to 2.
    """
    floors = {"cosine": 2 * EPS32, "student_norm": EPS, "teacher_norm": EPS}
    if case.kind == "mse":
        return floors
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
    u_s, u_t = unit(z_s), unit(z_t)
    difference = (u_s - u_t).norm(dim=-1)
    # 3: nmse's factor 2 / D at D = 1 times the largest upstream gradient of `run`.
    per_row = 3 * case.upstream * EPS32 * (difference + element) / z_s.norm(dim=-1)
    per_row = per_row[per_row.isfinite()]
    # The errors of two elements, each uniform in half a unit, deviate by EPS32 / sqrt(6).
    losses = 1.25 * EPS32 * ((u_s - u_t) * u_s).norm(dim=-1) + EPS32**2
    losses = losses[losses.isfinite()] * (2 / z_s.shape[-1] if case.kind == "nmse" else 1.0)
    floors["loss"] = float(losses.sum())
    floors["grad_student"] = float(per_row.max() * proj_max) if per_row.numel() else 0.0
    floors["grad_proj"] = float(per_row.sum() * h_max)
    return floors


def _error(got: Tensor, want: Tensor) -> Tensor:
    error = (got.double() - want).abs()
    error[got.double() == want] = 0  # equal infinities
    return error.nan_to_num(nan=0.0, posinf=torch.inf).max()
