"""What the GPU table times: the kernels of each backend, and what others do instead.

Gradients are taken with torch.autograd.grad: ``.backward()`` on a leaf would clone them. Shapes: M
rows; student d wide, in the Bridge 2,048 with a teacher of 2,560; r: projector rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.regimes import DTYPES, compiled, device, flow, states
from oprd_kernels import fused_rep_loss, fused_rep_losses, rep_tap
from oprd_kernels.backends import registry

PEERS = ("eager", "compile", "liger", "three GEMMs")


@dataclass(frozen=True)
class Variant:
    """``whole``: loss and gradient; ``forward``: the loss alone, where it is timed apart;
    ``in_graph``: whether a CUDA graph can hold them."""

    whole: Callable[[], object]
    forward: Callable[[], object] | None = None
    in_graph: bool = True


@dataclass(frozen=True)
class GpuCase:
    """One line of a table.

    Attributes:
        group: the table.
        what: in the table's words.
        m, d, dtype: rows, student's width, ``fp32`` or ``bf16``.
        floor_bytes, floor_flops: what the work cannot do without.
        make: builds new inputs and returns the variants on them, by name.
    """

    group: str
    what: str
    m: int
    d: int
    dtype: str
    floor_bytes: int
    floor_flops: int
    make: Callable[[], dict[str, Variant]]

    @property
    def name(self) -> str:
        return f"{self.what}, M = {self.m:,}, {self.dtype}"


def ours() -> tuple[str, ...]:
    """The backends timed: a GPU's, or the one that stands in for them on a CPU."""
    return ("cuda", "triton") if device().type == "cuda" else ("cpu",)


def available() -> tuple[str, ...]:
    """Those of `ours` that are installed; of calls they refuse, the call tells."""
    return tuple(b for b in ours() if registry.unavailable(b, device()) is None)


def _gradient(loss: Callable[[], Tensor], *of: Tensor, ready: bool = True) -> Variant:
    """``ready``: the upstream gradient is there and not made by a kernel of the call."""
    one = torch.ones((), device=of[0].device) if ready else None
    return Variant(lambda: torch.autograd.grad(loss(), of, one), loss)


@functools.cache
def liger_compiles() -> bool:
    """Whether Liger's loss, which it compiles by default, can be compiled here."""
    small = [torch.ones(n, 16, device=device()) for n in (8, 8, 4, 4)]
    try:
        peers.liger(small[0].requires_grad_(), *small[1:], compiled=device().type == "cuda")
    except Exception:
        return False
    return device().type == "cuda"


def identity(how: str, m: int, d: int, dtype: str, with_peers: bool, compile: bool) -> GpuCase:
    """The states themselves: ``in place``, ``new gradient`` or ``rep_tap``."""
    e = DTYPES[dtype].itemsize
    passes = {"in place": 3, "new gradient": 5, "rep_tap": 6}[how]

    def make() -> dict[str, Variant]:
        x, teacher = states(m, d, dtype).requires_grad_(), states(m, d, dtype, 1)
        found = {b: _identity(how, x, teacher, b) for b in available()}
        if with_peers and how == "rep_tap":
            found["eager"] = Variant(flow(lambda h: (h, peers.eager(h, teacher)), x, False))
        elif with_peers:
            found["eager"] = _gradient(lambda: peers.eager(x, teacher), x)
        if compile:
            function = compiled(peers.eager, "gpu", m, d, dtype)
            found["compile"] = _gradient(lambda: function(x, teacher), x)
        return found

    what = f"identity, {how}"
    return GpuCase("identity", what, m, d, dtype, passes * m * d * e, 0, make)


def _identity(how: str, x: Tensor, teacher: Tensor, backend: str, ready: bool = True) -> Variant:
    if how == "rep_tap":
        # A leaf of its own: autograd binds a leaf to the stream of its first graph, which is then
        # not captured with another.
        leaf = x.detach().requires_grad_()
        return Variant(
            flow(lambda h: rep_tap(h, teacher, backend=backend), x, False),
            lambda: rep_tap(leaf, teacher, backend=backend)[1],
        )
    inplace = how == "in place"
    return _gradient(
        lambda: fused_rep_loss(x, teacher, backend=backend, inplace=inplace), x, ready=ready
    )


def bridge(
    rank: int, m: int, d: int, dtype: str, mean: bool, with_peers: bool, compile: bool = False,
    trained: bool = False,
) -> GpuCase:  # fmt: skip
    """Both sides projected to r dimensions, the gradient in a new tensor; with ``trained`` also
    that of P_S, which reads the student's states again."""
    e, d_t = DTYPES[dtype].itemsize, d * 5 // 4

    def make() -> dict[str, Variant]:
        x, teacher = states(m, d, dtype).requires_grad_(), states(m, d_t, dtype, 1)
        p_s, p_t = states(rank, d, "fp32", 2) / d**0.5, states(rank, d_t, "fp32", 3) / d_t**0.5
        p_s.requires_grad_(trained)
        projectors = {"student_proj": p_s, "teacher_proj": p_t}
        middle = teacher.float().mean(0) if mean else torch.zeros(d_t, device=x.device)
        if mean:
            projectors["teacher_mean"] = middle
        of = (x, p_s) if trained else (x,)

        def fused(backend: str) -> Callable[[], Tensor]:
            return lambda: fused_rep_loss(x, teacher, **projectors, backend=backend)

        found = {b: _gradient(fused(b), *of) for b in available()}
        if with_peers:
            projected = peers.eager_projected
            found["eager"] = _gradient(lambda: projected(x, teacher, p_s, p_t, middle), *of)
            found["three GEMMs"] = Variant(_three_products(x.detach(), teacher, p_s.detach(), p_t))
        if compile:
            function = compiled(peers.eager_projected, "gpu", rank, m, d, dtype)
            found["compile"] = _gradient(lambda: function(x, teacher, p_s, p_t, middle), *of)
            if find_spec("liger_kernel"):
                found["liger"] = Variant(
                    lambda: torch.autograd.grad(
                        peers.liger(x, teacher, p_s, p_t, compiled=liger_compiles()), x
                    ),
                    in_graph=False,  # it waits for the device
                )
        return found

    with_mean = "P_S trained" if trained else "mean" if mean else "no mean"
    what = f"Bridge r = {rank}, {with_mean}"
    floor_bytes = m * e * (d + d_t + d + (d if trained else 0))
    floor_flops = 2 * m * rank * (2 * d + d_t + (d if trained else 0))
    return GpuCase("bridge", what, m, d, dtype, floor_bytes, floor_flops, make)


def _three_products(x: Tensor, teacher: Tensor, p_s: Tensor, p_t: Tensor) -> Callable[[], object]:
    """H_S P_S', H_T P_T' and dz P_S by BLAS in the states' own precision, and nothing else."""
    p_s, p_t = p_s.to(x.dtype), p_t.to(x.dtype)
    z_s, z_t = (x.new_empty(len(x), len(p_s)) for _ in range(2))
    gradient = torch.empty_like(x)

    def products() -> None:
        torch.mm(x, p_s.T, out=z_s)
        torch.mm(teacher, p_t.T, out=z_t)
        torch.mm(z_s, p_s, out=gradient)

    return products


def layers(number: int, m: int, d: int, dtype: str) -> GpuCase:
    """Several layers in one call of `fused_rep_losses`, M rows each."""
    e = DTYPES[dtype].itemsize

    def make() -> dict[str, Variant]:
        xs = [states(m, d, dtype, i).requires_grad_() for i in range(number)]
        ts = [states(m, d, dtype, 100 + i) for i in range(number)]

        def fused(backend: str) -> Callable[[], Tensor]:
            return lambda: fused_rep_losses(xs, ts, backend=backend).mean()

        def eager() -> Tensor:
            pairs = zip(xs, ts, strict=True)
            return torch.stack([peers.eager(x, t) for x, t in pairs]).mean()

        found = {b: _gradient(fused(b), *xs) for b in available()}
        return found | {"eager": _gradient(eager, *xs)}

    what = f"{number} layers, new gradients"
    return GpuCase("layers", what, m, d, dtype, 5 * number * m * d * e, 0, make)


def cases(tiny: bool = False) -> Iterator[GpuCase]:
    """All of them, what matters most first; ``tiny``: of a size for a test on a CPU."""
    main, d = (48, 16) if tiny else (65536, 2048)
    rows = (16,) if tiny else (1024, 4096, 16384, 131072)
    dtypes = ("bf16", "fp32")
    hows = ("in place", "new gradient", "rep_tap")
    for rank in (4, 8, 16, 64, 256):
        for dtype in dtypes:
            compile = not tiny and dtype == "bf16" and rank in (8, 64, 256)
            yield bridge(rank, main, d, dtype, True, True, compile)
    for how in hows:
        for dtype in dtypes:
            yield identity(how, main, d, dtype, True, not tiny and how == "new gradient")
    yield layers(2, 16, 8, "bf16") if tiny else layers(28, 4096, 1536, "bf16")
    for m in rows:
        for rank in (8, 64, 256):
            yield bridge(rank, m, d, "bf16", True, False)
        for how in hows:
            for dtype in dtypes:
                yield identity(how, m, d, dtype, how != "rep_tap", False)
    for dtype in dtypes:
        yield bridge(64, main, d, dtype, True, True, trained=True)
    for rank in (4, 8, 16, 64, 256):
        for dtype in dtypes:
            yield bridge(rank, main, d, dtype, False, False)


class Empty(torch.autograd.Function):
    """Keeps its inputs, allocates what it returns, computes nothing."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        return student.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _grad):
        return torch.empty_like(ctx.saved_tensors[0]), None


def host_calls() -> dict[str, Variant]:
    """Calls on 64 x 128 bf16, where Python is what takes time; the empty ones are what autograd
    takes by itself, the second in the chain of functions that stands for a model around a tap. The
    upstream gradient is made in the call, as by ``loss.backward()``."""
    x, teacher = states(64, 128, "bf16").requires_grad_(), states(64, 128, "bf16", 1)
    found = {"empty autograd.Function": _gradient(lambda: Empty.apply(x, teacher), x, ready=False)}
    for b in available():
        found[f"fused_rep_loss, {b}"] = _identity("new gradient", x, teacher, b, ready=False)
        found[f"fused_rep_loss in place, {b}"] = _identity("in place", x, teacher, b, ready=False)
    found["empty, as a tap"] = Variant(
        flow(lambda h: (h, Empty.apply(h, teacher)), x, False), lambda: Empty.apply(x, teacher)
    )
    for b in available():
        found[f"rep_tap, {b}"] = _identity("rep_tap", x, teacher, b)
    return found
