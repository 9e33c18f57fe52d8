"""`rep_tap` gives the gradients of the loss written beside the model, whatever the graph."""

import pytest
import torch

from oprd_kernels import fused_rep_loss, rep_tap

D = 24


def graphs():
    """Ways in which states h are used behind a tap; some hand one gradient tensor to several
    places, which an in-place addition would corrupt."""
    w = torch.randn(D, D)
    mask = (torch.rand(6, D) < 0.5).float()

    def hooked(h):
        kept = []
        h.register_hook(kept.append)
        return (h @ w).square().sum() + h.sum()

    return {
        "one consumer": lambda h: (h @ w).square().sum(),
        "residual add": lambda h: (h + (h @ w).tanh()).square().sum(),
        "two consumers": lambda h: (h @ w).sum() + (h * mask).square().sum(),
        "expanded gradient": lambda h: h.sum(),
        "view": lambda h: h.view(3, 2, D)[1].square().sum() + h.T.contiguous().sum(),
        "hook": hooked,
        "only a slice": lambda h: h[2:4].square().sum(),
        "nothing": lambda h: h.detach().sum(),
    }


def run(use, tapped, backend, h0, teacher, options):
    x = h0.clone().requires_grad_()
    h = x * 1.5  # not a leaf, as in a model
    residual = h + 0.1  # a second consumer of h before the tap
    if tapped:
        out, loss = rep_tap(h, teacher, backend=backend, **options)
    else:
        out, loss = h, fused_rep_loss(h, teacher, backend="reference", **options)
    total = use(out) + 3 * loss.sum() + residual.square().sum()
    total.backward()
    return total.detach(), x.grad


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("picked", [None, [4, 0, 1]], ids=["all rows", "rows"])
@pytest.mark.parametrize("graph", graphs().keys())
def test_gradients_equal_those_of_a_loss_beside_the_model(backend, graph, picked, rank):
    torch.manual_seed(0)
    h0, use = torch.randn(6, D), graphs()[graph]
    options = {"kind": "mse"}
    if picked is not None:
        options["rows"] = torch.tensor(picked)
    teacher = torch.randn(6 if picked is None else len(picked), D)
    if rank:
        options |= {"student_proj": torch.randn(rank, D), "teacher_proj": torch.randn(rank, D)}
    expected = run(use, False, backend, h0, teacher, options)
    actual = run(use, True, backend, h0, teacher, options)
    assert torch.allclose(actual[0], expected[0], rtol=1e-5)
    assert torch.allclose(actual[1], expected[1], rtol=1e-5, atol=1e-5)


def test_the_hooks_copy_of_the_gradient_is_not_changed(backend):
    kept = []
    x = torch.randn(4, D, requires_grad=True)
    h, loss = rep_tap(x * 1.0, torch.randn(4, D), backend=backend)
    h.register_hook(kept.append)
    (h.square().sum() / 2 + loss).backward()
    assert torch.equal(kept[0], h.detach())


def test_retain_graph_and_two_backwards(backend):
    x = torch.randn(4, D, requires_grad=True)
    h, loss = rep_tap(x * 1.0, torch.randn(4, D), backend=backend)
    total = h.square().sum() + loss
    total.backward(retain_graph=True)
    first = x.grad.clone()
    total.backward()
    assert torch.equal(x.grad, 2 * first)


def test_loss_that_is_not_used_changes_nothing(backend):
    x = torch.randn(4, D, requires_grad=True)
    h, _ = rep_tap(x * 1.0, torch.randn(4, D), backend=backend)
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_states_without_gradient_pass(backend):
    x = torch.randn(4, D)
    h, loss, stats = rep_tap(x, torch.randn(4, D), backend=backend, return_stats=True)
    assert torch.equal(h, x)
    assert not loss.requires_grad
    assert stats.num_valid == 4


def test_trainable_projector_gets_its_gradient(backend):
    torch.manual_seed(0)
    x, teacher = torch.randn(5, D, requires_grad=True), torch.randn(5, 3)
    gradients = []
    for tapped in (False, True):
        proj = torch.randn(3, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if tapped:
            _, loss = rep_tap(x * 1.0, teacher, student_proj=proj, backend=backend)
        else:
            loss = fused_rep_loss(x * 1.0, teacher, student_proj=proj, backend="reference")
        loss.backward()
        gradients.append(proj.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_frozen_projection_keeps_no_wide_input(backend):
    """After the forward pass only dz (r floats a row) and the statistics are kept; by Triton also
    the projector in the terms that backward multiplies by (three of 16 bits, ranks padded to 16, as
    r in dz to 8)."""
    x = torch.randn(64, 512, requires_grad=True)
    proj = {"student_proj": torch.randn(4, 512), "teacher_proj": torch.randn(4, 512)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, loss = rep_tap(x * 1.0, torch.randn(64, 512), backend=backend, **proj)
    assert loss.requires_grad
    assert not [t.shape for t in saved if 512 in t.shape and t.shape[0] != 4 and t is not x]
    kept = sum(t.numel() for t in saved if 512 not in t.shape)
    if backend == "triton":
        assert kept <= 64 * 8 + 3 * 16 * 512 // 2 + 64
    else:
        assert kept <= 64 * (4 + 4) + 8


def test_second_derivative_is_refused(backend):
    x = torch.randn(4, D, requires_grad=True)
    h, loss = rep_tap(x * 1.0, torch.randn(4, D), backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss + h.sum(), x, create_graph=True)
    loss = fused_rep_loss(x, torch.randn(4, D), backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_adds_in_place_where_nobody_else_holds_the_gradient(backend, peak_bytes):
    """A chain as in a model: the gradient that leaves the tap is the one that came, in memory."""
    x = torch.randn(4, D, requires_grad=True)
    seen = []
    before = x * 1.0
    before.register_hook(lambda g: seen.append(g.data_ptr()))
    h, loss = rep_tap(before, torch.randn(4, D), backend=backend)

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h * 2

        @staticmethod
        def backward(ctx, grad):
            made = grad * 2
            seen.append(made.data_ptr())
            return made

    (Mark.apply(h).sum() + loss).backward()
    assert seen[0] == seen[1]


def test_takes_no_memory_beside_64_bytes_a_row(compiled_backend, peak_bytes):
    m, d = 16384, 1024
    x, teacher = torch.randn(m, d, requires_grad=True), torch.randn(m, d)
    pool = [torch.ones(m, d)]

    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.new_zeros(())

        @staticmethod
        def backward(ctx, _):
            return pool.pop()

    class Take(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            pool.append(grad)
            return None

    def step():
        h, loss = rep_tap(Take.apply(x), teacher, backend=compiled_backend)
        (Give.apply(h) + loss).backward()

    step()
    assert peak_bytes(step) <= 64 * m


@pytest.mark.parametrize("shared", ["residual", "user", "view", "hook", "saved"])
def test_a_gradient_that_others_hold_is_left_alone(backend, shared):
    """Naive in-place addition would change what the other holder sees."""
    torch.manual_seed(0)
    x, teacher = torch.randn(4, D, requires_grad=True), torch.randn(4, D)
    kept: list[torch.Tensor] = []
    h, loss = rep_tap(x * 1.0, teacher, backend=backend)
    if shared == "residual":  # one tensor for both branches of the addition
        other = x * 2.0
        other.register_hook(kept.append)
        (h + other).backward(torch.ones(4, D), retain_graph=True, inputs=[x])
        expected = torch.ones(4, D)
    elif shared == "user":
        kept.append(torch.ones(4, D))
        torch.autograd.backward([h, loss], [kept[0], None])
        expected = torch.ones(4, D)
    elif shared == "view":  # both parts of a concatenation get views of one gradient
        other = x * 2.0
        other.register_hook(kept.append)
        (torch.cat([other, h]).square().sum() / 2 + loss).backward()
        expected = other.detach()
    elif shared == "hook":
        h.register_hook(kept.append)
        ((h * 3.0).sum() + loss).backward()
        expected = torch.full((4, D), 3.0)
    else:  # a backward that returns a tensor it has saved

        class Keeps(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                kept.append(torch.ones_like(h))
                return h.sum()

            @staticmethod
            def backward(ctx, grad):
                return kept[0]

        (Keeps.apply(h) + loss).backward()
        expected = torch.ones(4, D)
    assert torch.equal(kept[0], expected)
