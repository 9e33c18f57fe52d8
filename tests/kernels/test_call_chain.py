"""The way of a call from the public functions to the kernels."""

import ast
import graphlib
from pathlib import Path

import pytest
import torch

import oprd_kernels
from oprd_kernels import BackendUnavailable, fused_rep_loss, fused_rep_losses, native, validate
from oprd_kernels import saved_buffer as layout
from oprd_kernels.backends import cuda, registry
from oprd_kernels.call import GradCall, LossCall

PACKAGE = Path(oprd_kernels.__file__).parent
S, T = torch.randn(6, 8), torch.randn(6, 8)
TRAINED = S.clone().requires_grad_()


def imports_of(path, modules):
    """The modules of the package that a file imports anywhere, for type checking alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def test_modules_import_without_cycles():
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {
        name: {found for found in imports_of(path, modules) if found in modules}
        for name, path in modules.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("oprd_kernels.call") < order.index("oprd_kernels.backends.registry")
    assert order[-1] in ("oprd_kernels", "oprd_kernels.doctor")


@pytest.mark.parametrize("alike", [True, False])
def test_layers_share_one_check_of_what_they_share(monkeypatch, alike):
    found = []
    shared = validate._shared

    def counted(*arguments):
        found.append(arguments)
        return shared(*arguments)

    monkeypatch.setattr(validate, "_shared", counted)
    students = [torch.randn(6, 8 if alike else 4 + i) for i in range(5)]
    teachers = [torch.randn_like(student[:3]) for student in students]
    options = {"rows": torch.tensor([0, 5, 2]), "weights": torch.ones(3), "denominator": 2.0}
    losses = fused_rep_losses(students, teachers, **options)
    assert len(found) == 1
    singles = [fused_rep_loss(*pair, **options) for pair in zip(students, teachers, strict=True)]
    assert torch.equal(losses, torch.stack(singles))


def test_a_layer_whose_teacher_has_other_rows_is_checked_against_them():
    teachers, index = [torch.randn(9, 8), torch.randn(7, 8)], torch.tensor([0, 1, 2, 3, 4, 8])
    with pytest.raises(IndexError, match=r"teacher_rows must lie in \[0, 7\)"):
        fused_rep_losses([S, S.clone()], teachers, teacher_rows=index)


def test_projectors_are_converted_once():
    proj = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    options = {"rows": None, "teacher_rows": None, "weights": None, "denominator": None}
    call = validate.check_call(
        S, torch.randn(6, 2), student_proj=proj, teacher_proj=None, teacher_mean=None,
        kind="nmse", reduction="mean", **options,
    )  # fmt: skip
    assert call.student_proj.dtype == torch.float32
    assert (call.rank, call.num_rows, call.is_double) == (2, 6, False)
    fused_rep_loss(S, torch.randn(6, 2), student_proj=proj).backward()
    assert proj.grad.dtype == torch.bfloat16


needs_native = pytest.mark.skipif(native.problem() is not None, reason="no native module here")


@needs_native
@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        ([S], [T], 2),
        ([TRAINED], [T.bfloat16()], 2),
        ([torch.nn.Parameter(T)], [S], 2),
        ([S[None]], [T], 2),
        ([S], [T[:4]], 1),
        ([S, S], [T, T], 2),
        ([S, S[:5]], [T, T], 0),
        ([S, S.half()], [T, T], 0),
        ([S], [S], 0),
        ([S], [TRAINED], 0),
        ([S, S], [T, [1.0]], 0),
        ([S, S], [T, S], 0),
        ([S], [torch.randn(6, 9)], 0),
        ([S[0]], [T[0]], 0),
        ([S[:, :0]], [T[:, :0]], 0),
        ([S.double()], [T], 0),
        ([S], [T.int()], 0),
        ([S], [T.to_sparse()], 0),
        ([S], [T.to("meta")], 0),
        ([S.to("meta")], [T.to("meta")], 0),
        ([S], [[1.0]], 0),
        ([S], [T.as_subclass(type("Other", (torch.Tensor,), {}))], 0),
    ],
)
def test_what_needs_no_check_in_python(students, teachers, expected):
    assert native.need_no_check(students, teachers) == expected


@needs_native
def test_a_module_built_for_other_calls_is_not_used(monkeypatch):
    monkeypatch.setattr(native.module(), "GRAD_FIELDS", GradCall._fields[::-1])
    module, reason = native._import_native()
    assert module is None
    assert "built for another version" in reason


@needs_native
def test_native_functions_say_what_they_were_not_given():
    forward, loss, saved = native.module().forward, torch.zeros(()), torch.zeros(99)
    with pytest.raises(TypeError, match="expected 5 arguments"):
        forward((LossCall(S, T),))
    with pytest.raises(TypeError, match="not a call"):
        forward((tuple(LossCall(S, T))[:4],), None, loss, saved, 1)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        forward((LossCall(S.double(), T),), None, loss, saved, 1)
    with pytest.raises(TypeError, match="2 or 3 dimensions"):
        forward((LossCall(S[0], T),), None, loss, saved, 1)
    with pytest.raises(AttributeError, match="data_ptr"):
        forward((LossCall(S, T),), None, "loss", saved, 1)
    with pytest.raises(TypeError, match="a gradient a layer"):
        native.module().backward((GradCall(saved, S, T),), (), False, loss, 1)


def test_saved_begins_with_the_statistics_whatever_the_backend(backend):
    call = LossCall(S, T)
    loss, saved = registry.get(backend).forward(call)
    assert registry.get(backend).name == backend
    assert saved.shape == (registry.get(backend).saved_size(call),)
    assert loss.shape == ()
    cosine = torch.nn.functional.cosine_similarity(S, T).mean()
    norms = [x.norm(dim=-1).mean() for x in (S, T)]
    expected = torch.tensor([cosine, *norms, 6, 1 / 6])
    assert torch.allclose(saved[: layout.STATS], expected, atol=1e-6)


def test_saved_tensor_hooks_may_replace_what_was_saved(backend):
    """Backward reads the tensors that it is given, not those that forward saw."""
    student = S.clone().requires_grad_()
    expected = torch.autograd.grad(fused_rep_loss(student, T, backend=backend), student)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        loss = fused_rep_loss(student, T, backend=backend)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)


def test_the_cuda_backend_launches_on_the_machine_it_is_given(monkeypatch):
    """The one seam between the launcher and what launches: a GPU, or the tests' emulation."""
    launched = []

    class Kernels:
        def cuda_scratch(self, rows, *_):
            return rows

        def cuda_forward(self, *arguments):
            launched.append(arguments)

        def cuda_backward(self, *arguments):
            launched.append(arguments)

    monkeypatch.setattr(cuda.BACKEND, "machine", cuda.Machine("cpu", Kernels(), lambda i: 70 + i))
    student = S.clone().requires_grad_()
    fused_rep_loss(student, T, backend="cuda").backward()
    (calls, grad, _loss, saved, scratch, *where), backward = launched
    assert isinstance(calls[0], LossCall)
    assert calls[0].student is student
    assert grad is None
    assert scratch.dtype == torch.float64
    assert scratch.shape == (6,)
    assert where == [*backward[4:]] == [-1, 69]
    assert isinstance(backward[0][0], GradCall)
    assert backward[0][0].saved.data_ptr() == saved.data_ptr()
    with pytest.raises(BackendUnavailable, match=r"one dtype a call"):
        fused_rep_loss(student, T.half(), backend="cuda")
    monkeypatch.setattr(cuda.BACKEND, "machine", None)
    with pytest.raises(BackendUnavailable, match="NVIDIA GPU, not on cpu"):
        fused_rep_loss(student, T, backend="cuda")


@pytest.mark.parametrize("rank", [0, 8, 64])
def test_auto_on_a_gpu_takes_the_faster_backend(monkeypatch, rank):
    """The CUDA kernels for the states themselves, Triton's for projections."""
    monkeypatch.setattr(registry, "unavailable", lambda name, device: None)
    monkeypatch.setattr(registry, "_unsupported", lambda backend, calls: None)
    on_gpu = [torch.empty(n, 8, device="meta") for n in (6, 6)]
    proj = torch.empty(rank, 8, device="meta") if rank else None
    call = LossCall(*on_gpu, student_proj=proj, teacher_proj=proj)
    assert registry.choose("auto", [call]) == ("triton" if rank else "cuda")
    monkeypatch.setattr(
        registry, "unavailable", lambda name, device: "missing" if name == "triton" else None
    )
    assert registry.choose("auto", [call]) == "cuda"
