"""The regimes measured: what runs, what it must move at least, and what others run instead.

A regime's variants do the same work: a loss, and its gradient where the regime needs it. Each is
a call without arguments. Bytes and operations are those of the floor (design.md): e is the size
of an element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import peers
from oprd_kernels import fused_rep_loss, fused_rep_losses, rep_tap

OURS = "oprd"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One point of a regime.

    Attributes:
        regime: group name.
        m, d: rows, and the student's width.
        dtype: ``fp32`` or ``bf16``.
        floor_bytes, floor_flops: what the work cannot do without.
        activation_bytes: M * d * e, the unit in which extra memory is given.
        variants: name -> call. ``oprd`` is ours; the call builds nothing that is not measured.
    """

    regime: str
    m: int
    d: int
    dtype: str
    floor_bytes: int
    floor_flops: int
    activation_bytes: int
    variants: dict[str, Callable[[], object]] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.regime} M={self.m} d={self.d} {self.dtype}"


class _Source(torch.autograd.Function):
    """Hidden states as a layer hands them on. Swallows the gradient that comes back, at no cost,
    and puts it into ``pool`` for the next call."""

    @staticmethod
    def forward(ctx, x: Tensor, pool: list[Tensor] | None) -> Tensor:
        ctx.pool = pool
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.pool is not None:
            ctx.pool.append(grad)
        return None, None


class _Downstream(torch.autograd.Function):
    """The rest of the model: sends a ready gradient back, at no cost, and keeps no hold of it."""

    @staticmethod
    def forward(ctx, h: Tensor, make_grad: Callable[[], Tensor]) -> Tensor:
        ctx.make_grad = make_grad
        return h.new_empty(())

    @staticmethod
    def backward(ctx, _grad):
        return ctx.make_grad(), None


def device() -> torch.device:
    """Where the benchmarks run: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def states(m: int, d: int, dtype: str, seed: int = 0) -> Tensor:
    """Random hidden states (m, d)."""
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn(m, d, generator=generator, device=device()).to(DTYPES[dtype])


@functools.cache
def compiled(function: Callable, *_case: object) -> Callable:
    """torch.compile of ``function`` for one case; a new function each, as recompilations of one
    are limited."""
    return torch.compile(lambda *arguments: function(*arguments), dynamic=False)


def _copy(m: int, d: int, dtype: str) -> Callable[[], object]:
    source, target = states(m, d, dtype), states(m, d, dtype)
    return lambda: target.copy_(source)


def _with_grad(student: Tensor, loss: Callable[[], Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(), student)


def identity(m: int, d: int, dtype: str, fresh: bool, compile: bool) -> Case:
    """Loss and gradient of the hidden states themselves, outside any model. Ours forms the gradient
    over the teacher's states (``oprd``) or, like the others, in a new tensor."""
    student, teacher = states(m, d, dtype).requires_grad_(), states(m, d, dtype, 1)
    e, threads = student.element_size(), torch.get_num_threads()
    run_compiled = compiled(peers.eager, m, d, dtype, threads) if compile else None
    variants = {
        OURS: _with_grad(student, lambda: fused_rep_loss(student, teacher, inplace=True)),
        "oprd, new gradient": _with_grad(student, lambda: fused_rep_loss(student, teacher)),
        "eager": _with_grad(student, lambda: peers.eager(student, teacher)),
        "upstream": _with_grad(
            student, lambda: peers.upstream_way([student[None]], [teacher[None]], m)
        ),
        "copy": _copy(m, d, dtype),
    }
    if run_compiled:
        variants["compile"] = _with_grad(student, lambda: run_compiled(student, teacher))
    return Case("identity in place", m, d, dtype, 3 * m * d * e, 0, m * d * e, variants)


def flow(
    loss_of: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, fresh: bool
) -> Callable[[], object]:
    """Forward and backward at a point of a model where a gradient flows already.

    The gradient is one buffer, handed over to autograd and taken back from the source at the end
    of the call; with ``fresh`` it is allocated and written in the call, as a model would.
    """
    ready = torch.full_like(x, 1e-3)
    pool = None if fresh else [ready.detach()]
    give = ready.clone if pool is None else pool.pop
    if pool is not None:
        del ready
    one = torch.ones((), dtype=x.dtype, device=x.device)

    def call() -> None:
        h, loss = loss_of(_Source.apply(x, pool))
        torch.autograd.backward([_Downstream.apply(h, give), loss], [one, None])

    return call


def tap(m: int, d: int, dtype: str, fresh: bool, compile: bool) -> Case:
    """Forward, and backward into a gradient that flows through: a layer inside a model."""
    x, teacher = states(m, d, dtype).requires_grad_(), states(m, d, dtype, 1)
    e, threads = x.element_size(), torch.get_num_threads()
    run_compiled = compiled(peers.eager, m, d, dtype, threads) if compile else None
    variants = {
        OURS: flow(lambda h: rep_tap(h, teacher), x, fresh),
        "eager": flow(lambda h: (h, peers.eager(h, teacher)), x, fresh),
        "copy": _copy(m, d, dtype),
    }
    if run_compiled:
        variants["compile"] = flow(lambda h: (h, run_compiled(h, teacher)), x, fresh)
    return Case("identity through rep_tap", m, d, dtype, 6 * m * d * e, 0, m * d * e, variants)


def bridge(rank: int, m: int, d: int, dtype: str, fresh: bool, compile: bool) -> Case:
    """A d wide student and a teacher a quarter wider, compared in r dimensions, with mean."""
    d_t = d * 5 // 4
    x, teacher = states(m, d, dtype).requires_grad_(), states(m, d_t, dtype, 1)
    p_s, p_t = states(rank, d, "fp32", 2) / d**0.5, states(rank, d_t, "fp32", 3) / d_t**0.5
    mean = teacher.float().mean(0)
    e, threads = x.element_size(), torch.get_num_threads()
    projectors = {"student_proj": p_s, "teacher_proj": p_t, "teacher_mean": mean}
    run_compiled = compiled(peers.eager_projected, rank, m, d, dtype, threads) if compile else None

    buffers = [torch.empty(m, n, device=x.device) for n in (d, d_t, rank, rank, d)]

    def products() -> None:
        """The three bare products in float32, upcast included: what BLAS alone would take."""
        h_s, h_t, z_s, z_t, d_s = buffers
        s = x.detach() if dtype == "fp32" else h_s.copy_(x.detach())
        t = teacher if dtype == "fp32" else h_t.copy_(teacher)
        torch.mm(s, p_s.T, out=z_s)
        torch.mm(t, p_t.T, out=z_t)
        torch.mm(z_s, p_s, out=d_s)

    arguments = (p_s, p_t, mean)
    variants = {
        OURS: flow(lambda h: rep_tap(h, teacher, **projectors), x, fresh),
        "eager": flow(lambda h: (h, peers.eager_projected(h, teacher, *arguments)), x, fresh),
        "three sgemms": products,
        "copy": _copy(m, d, dtype),
    }
    if run_compiled:
        variants["compile"] = flow(lambda h: (h, run_compiled(h, teacher, *arguments)), x, fresh)
    if find_spec("liger_kernel"):
        variants["liger"] = flow(
            lambda h: (h, peers.liger(h, teacher, p_s, p_t, compiled=x.is_cuda)), x, fresh
        )
    # Forward reads both; backward reads and writes the gradient. Three products of 2 M d r.
    floor_bytes = m * (d + d_t) * e + 2 * m * d * e
    floor_flops = 2 * m * rank * (2 * d + d_t)
    regime = f"Bridge r={rank}"
    return Case(regime, m, d, dtype, floor_bytes, floor_flops, m * d * e, variants)


def last_k(m: int, d: int, dtype: str, fresh: bool, compile: bool) -> Case:
    """The last k tokens of 8 sequences of 16,384: M = 8 k supervised rows of 131,072."""
    batch, length, k = 8, 16384, m // 8
    x = states(batch * length, d, dtype).view(batch, length, d).requires_grad_()
    teacher_full = states(batch * length, d, dtype, 1).view(batch, length, d)
    rows = torch.arange(batch * length, device=x.device).view(batch, length)[:, -k:].reshape(-1)
    teacher = teacher_full.flatten(0, 1)[rows]
    e = x.element_size()
    variants = {
        OURS: flow(lambda h: rep_tap(h, teacher, rows=rows), x, fresh),
        "upstream": flow(lambda h: (h, peers.upstream_way([h], [teacher_full], k)), x, fresh),
        "copy": _copy(m, d, dtype),
    }
    return Case("last k of 16,384", m, d, dtype, 6 * m * d * e, 0, m * d * e, variants)


def layers_28(m: int, d: int, dtype: str, fresh: bool, compile: bool) -> Case:
    """28 layers at once, M rows in all: losses and gradients of lists of hidden states."""
    layers, per_layer = 28, m // 28
    students = [states(per_layer, d, dtype, i).requires_grad_() for i in range(layers)]
    teachers = [states(per_layer, d, dtype, 100 + i) for i in range(layers)]
    e, rows = students[0].element_size(), layers * per_layer

    def eager() -> Tensor:
        pairs = zip(students, teachers, strict=True)
        return torch.stack([peers.eager(s, t) for s, t in pairs]).mean()

    def upstream() -> Tensor:
        return peers.upstream_way(
            [s[None] for s in students], [t[None] for t in teachers], per_layer
        )

    calls = {
        OURS: lambda: fused_rep_losses(students, teachers).mean(),
        "eager": eager,
        "upstream": upstream,
    }
    variants: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: torch.autograd.grad(loss(), students))
        for name, loss in calls.items()
    }
    variants["copy"] = _copy(rows, d, dtype)
    bytes_moved = 5 * rows * d * e  # two reads forward, two reads and a write backward
    return Case("28 layers", rows, d, dtype, bytes_moved, 0, rows * d * e, variants)
