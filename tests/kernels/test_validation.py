"""Errors name the argument, what was given and what is expected."""

import math
import subprocess
import sys

import pytest
import torch

from oprd_kernels import (
    BackendUnavailable,
    doctor,
    fused_rep_loss,
    fused_rep_losses,
    native,
    rep_tap,
)

S, T = torch.randn(6, 8), torch.randn(6, 8)
P = torch.randn(2, 8)


@pytest.mark.parametrize("call", [fused_rep_loss, rep_tap])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "l2"}, ValueError, r"kind must be one of .*got 'l2'"),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of .*got 'avg'"),
        ({"backend": "gpu"}, ValueError, r"backend must be 'auto' or one of .*got 'gpu'"),
        ({"reduction": "sum", "denominator": 3}, ValueError, "reduction='mean'"),
        ({"denominator": torch.ones(2)}, ValueError, "0-D tensor"),
        ({"denominator": "3"}, TypeError, "number or a 0-D tensor"),
        ({"teacher": torch.randn(6, 9)}, ValueError, "8 wide and teacher 9: pass student_proj"),
        ({"teacher": torch.randn(5, 8)}, ValueError, "6 rows and teacher 5"),
        ({"teacher": [1.0]}, TypeError, "teacher must be a torch.Tensor"),
        ({"teacher": T.to(torch.int32)}, TypeError, "teacher must be float32"),
        ({"teacher": T.to("meta")}, ValueError, "teacher is on the meta device"),
        ({"teacher": T.to_sparse()}, TypeError, "to_dense"),
        ({"teacher_proj": P}, ValueError, "need student_proj"),
        ({"student_proj": torch.randn(2, 9)}, ValueError, r"must be \(r, 8\)"),
        ({"student_proj": torch.empty(0, 8)}, ValueError, "rank 0"),
        ({"student_proj": torch.empty(0)}, ValueError, "2 dimension"),
        ({"student_proj": torch.empty(2, 0)}, ValueError, "FSDP"),
        ({"student_proj": P}, ValueError, "already be projected to r = 2, got 8"),
        ({"student_proj": P, "teacher_proj": torch.randn(3, 8)}, ValueError, r"\(2, 8\)"),
        (
            {"student_proj": P, "teacher_proj": P, "teacher_mean": torch.zeros(3)},
            ValueError,
            r"teacher_mean must be \(8,\)",
        ),
        (
            {"student_proj": P, "teacher": torch.randn(6, 2), "teacher_mean": torch.zeros(2)},
            ValueError,
            "pass it with teacher_proj",
        ),
        ({"rows": torch.tensor([0, 6])}, IndexError, r"rows must lie in \[0, 6\).*0\.\.6"),
        ({"rows": torch.tensor([-1, 2])}, IndexError, r"-1\.\.2"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "rows names a row twice"),
        ({"rows": torch.tensor([0.0])}, TypeError, "1-D int64"),
        ({"teacher_rows": torch.full((6,), 9)}, IndexError, "teacher_rows must lie in"),
        ({"weights": torch.ones(5)}, ValueError, "one value per supervised row, 6"),
        ({"weights": [1.0] * 6}, TypeError, "weights must be a tensor of real numbers, got list"),
        ({"weights": torch.ones(6) * 1j}, TypeError, "real numbers, got torch.complex64"),
        (
            {"weights": torch.ones(6, requires_grad=True)},
            ValueError,
            r"weights requires a gradient.*weights\.detach\(\).*reduction='none'",
        ),
        (
            {"denominator": torch.ones((), requires_grad=True)},
            ValueError,
            r"denominator requires a gradient.*denominator\.detach\(\)",
        ),
        ({"denominator": -1}, ValueError, r"positive float32, got -1\.0"),
        ({"denominator": math.nan}, ValueError, "positive float32, got nan"),
        ({"denominator": math.inf}, ValueError, "positive float32, got inf"),
        ({"denominator": 1e-60}, ValueError, "positive float32, got 1e-60"),
        ({"denominator": torch.tensor(-2)}, ValueError, "positive float32, got -2"),
        ({"denominator": torch.tensor([math.nan])}, ValueError, "positive float32, got nan"),
        ({"denominator": torch.tensor(1j)}, ValueError, "real number, got torch.complex64"),
        ({"teacher": S.requires_grad_(), "student": S}, ValueError, "the same tensor"),
    ],
)
def test_bad_arguments(call, arguments, error, message):
    arguments = {"student": S, "teacher": T} | arguments
    if "rows" in arguments and arguments["rows"].numel() != 6:
        arguments["teacher"] = torch.randn(arguments["rows"].numel(), 8)
    positional = (arguments.pop("student"), arguments.pop("teacher"))
    with pytest.raises(error, match=message):
        call(*positional, **arguments)


@pytest.mark.parametrize("call", [fused_rep_loss, lambda s, t: rep_tap(s, t)[1]])
def test_functorch_transforms_are_refused_with_the_fix(call):
    with pytest.raises(RuntimeError, match=r"torch\.func transforms.*loss\.backward\(\)"):
        torch.func.grad(lambda s: call(s, T))(S.detach())
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.vmap(call)(S.detach(), T)


def test_named_backend_that_cannot_take_the_input():
    with pytest.raises(BackendUnavailable, match="float64"):
        fused_rep_loss(S.double(), T.double(), backend="cpu")


def test_dtensor_is_refused_with_the_fix():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="to_local"):
        fused_rep_loss(S, T.as_subclass(DTensor))


def test_missing_native_code_is_explained(monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_reason", "no C++ compiler was found")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler was found.*C\+\+17 compiler"):
        fused_rep_loss(S, T, backend="cpu")
    assert fused_rep_loss(S, T).isfinite()  # "auto" falls back to the reference
    assert "cpu        missing: the native CPU kernels are not installed" in doctor.report()


def test_layers_share_the_checks_of_weights_and_denominator():
    for wrong in ({"weights": torch.ones(6, requires_grad=True)}, {"denominator": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fused_rep_losses([S, S], [T, T], **wrong)


@pytest.mark.parametrize(
    "denominator", [0, 0.0, torch.zeros(()), torch.zeros(1, dtype=torch.int64)]
)
def test_denominator_zero_learns_nothing(backend, denominator):
    student = S.detach().clone().requires_grad_()
    teacher = torch.full_like(T, torch.nan)  # whatever the rows hold
    loss = fused_rep_loss(student, teacher, denominator=denominator, backend=backend)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_weights_of_a_graph_are_taken_where_no_gradient_is_asked_for():
    weights = torch.rand(6, requires_grad=True)
    expected = fused_rep_loss(S.detach(), T, weights=weights.detach())
    with torch.no_grad():
        assert torch.equal(fused_rep_loss(S, T, weights=weights), expected)
    negative = fused_rep_loss(S.detach(), T, weights=-weights.detach(), reduction="sum")
    assert torch.allclose(negative, -expected * weights.sum())


def test_missing_compiler(tmp_path):
    """The warning points at the user's import, and each backend's line at its own kernels."""
    module = tmp_path / "users_module.py"
    module.write_text("# one line\nfrom oprd_kernels import fused_rep_loss\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.modules['oprd_kernels._native'] = None; sys.path.append(sys.argv[1])\n"
        "import users_module\n"
        "from oprd_kernels import doctor; print(doctor.report())\n"
    )
    result = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    warnings = [line for line in result.stderr.splitlines() if "UserWarning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{module}:2: UserWarning: oprd_kernels: the native CPU kernels")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if "missing: " in line}
    assert "missing: the native CPU kernels are not installed (" in lines["cpu"]
    assert "C++17 compiler" in lines["cuda"]
    assert "missing: the CUDA kernels are not installed: the native module" in lines["cuda"]
    assert "nvcc" in lines["cuda"]
    assert "CPU kernels" not in lines["cuda"]


def test_doctor_lists_versions_and_backends(backend):
    text = doctor.report()
    assert f"torch         {torch.__version__}" in text
    assert "live: C++" in text


def test_kernels_do_not_import_the_training_layer_or_transformers():
    code = (
        "import sys, oprd_kernels; "
        "bad = {m.split('.')[0] for m in sys.modules} & {'oprd', 'transformers'}; "
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_tensors_that_only_stand_for_others(backend):
    """As an AsyncCollectiveTensor does: at its address is nothing."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    plain = torch.randn(3, 8)
    for pair in ((Wrapper(plain), torch.randn(3, 8)), (plain, Wrapper(torch.randn(3, 8)))):
        with pytest.raises(
            TypeError, match=r"a Wrapper has no memory of its own: pass the tensor that it wraps"
        ):
            fused_rep_loss(*pair, backend=backend)


def test_a_negation_yet_to_be_made(backend):
    z = torch.randn(3, 8, dtype=torch.complex64)
    teacher = torch.randn(3, 8)
    for student in (z.conj().imag, teacher):
        other = teacher if student is not teacher else z.conj().imag
        loss = fused_rep_loss(student, other, kind="mse", backend=backend)
        assert torch.allclose(loss, (student - other).square().mean())
